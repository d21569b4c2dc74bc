"""The model room: a Hugging Face model, unmodified, with names on it."""

from mechscope.models.certificate import Certificate
from mechscope.models.load import load
from mechscope.models.model import Model
from mechscope.models.process import centre_writers, fold_norms
from mechscope.models.result import Receipt, Run
from mechscope.models.sites import SITES, Site
from mechscope.models.token_mask import TokenMask

__all__ = [
    "SITES",
    "Certificate",
    "Model",
    "Receipt",
    "Run",
    "Site",
    "TokenMask",
    "centre_writers",
    "fold_norms",
    "load",
]
