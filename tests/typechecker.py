"""The type checker of `make typed`: beartype, with whole numbers accepted as floats."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
