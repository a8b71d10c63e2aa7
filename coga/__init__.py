"""CoGA: trainable long-context attention through groups of tokens that are formed by content."""

from coga.config import CoGAConfig

__all__ = ["CoGAConfig", "__version__"]
__version__ = "0.1.0"
