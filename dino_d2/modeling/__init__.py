from . import backbone

__all__ = ["backbone"]
