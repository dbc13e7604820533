"""A command's configuration: composed by Hydra from files and overrides, checked by the command's dataclass."""

from anchorctx.config.compose import SCHEMAS, compose_config, conf_dir, resolve, schema
from anchorctx.config.overrides import check_whole, quoted
from anchorctx.config.sentences import MOVED

__all__ = ["MOVED", "SCHEMAS", "check_whole", "compose_config", "conf_dir", "quoted", "resolve", "schema"]
