"""Samples over HTTP: `fastsde serve`. Needs `pip install 'fastsde[serve]'`."""

from fastsde.serve.app import create_app
from fastsde.serve.service import Limits, ModelService, PipelineService, Service, TokenService

__all__ = ["Limits", "ModelService", "PipelineService", "Service", "TokenService", "create_app"]
