"""fastsde: samples from pretrained diffusion models, with no schedule to tune."""

import lazy_loader

__version__ = "0.1.0"

# The names and where they are: __init__.pyi. They are imported when they are used, and torch with the first of them.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
