"""`python -m fastsde`: for `torchrun` and `accelerate launch`, which start modules."""

from fastsde.cli.main import main

if __name__ == "__main__":
    main(prog_name="fastsde")
