"""Masked tokens: models, and solvers that run in the same engine as those of diffusions."""

from fastsde.tokens.ancestral import Ancestral, FirstHitting
from fastsde.tokens.blocks import Blocks
from fastsde.tokens.exact import ExactTokens
from fastsde.tokens.folder import TokenFolder, load_tokens, save_tokens
from fastsde.tokens.model import Critic, TokenGuidance, TokenModel, check_tokens
from fastsde.tokens.process import (
    ARCCOSINE,
    LINEAR,
    MASK,
    ONE_MINUS_COSINE,
    SINE,
    SINE_SQUARED,
    Masking,
    Schedule,
    exponential,
    power,
)
from fastsde.tokens.reading import from_amused, from_transformers
from fastsde.tokens.remask import ByConfidence, Cap, Loop, ReMDM, Rescale, TokenCritic
from fastsde.tokens.request import resolve
from fastsde.tokens.solver import TokenSolver
from fastsde.tokens.unmask import EntropyBudget, Unmask

SOLVERS: tuple[type[TokenSolver], ...] = (EntropyBudget, Unmask, FirstHitting, Ancestral, ReMDM, TokenCritic, Blocks)
"""The list behind the table of solvers."""

__all__ = [
    "ARCCOSINE",
    "LINEAR",
    "MASK",
    "ONE_MINUS_COSINE",
    "SINE",
    "SINE_SQUARED",
    "SOLVERS",
    "Ancestral",
    "Blocks",
    "ByConfidence",
    "Cap",
    "Critic",
    "EntropyBudget",
    "ExactTokens",
    "FirstHitting",
    "Loop",
    "Masking",
    "ReMDM",
    "Rescale",
    "Schedule",
    "TokenCritic",
    "TokenFolder",
    "TokenGuidance",
    "TokenModel",
    "TokenSolver",
    "Unmask",
    "check_tokens",
    "exponential",
    "from_amused",
    "from_transformers",
    "load_tokens",
    "power",
    "resolve",
    "save_tokens",
]
