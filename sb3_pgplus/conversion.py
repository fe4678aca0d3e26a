"""Files of SB3's models, and early ones of this package, as files that need no pickle."""

from pathlib import Path

from sb3_pgplus.configs import ConfigError, algorithm_class
from sb3_pgplus.model_file import pickled_attributes, read
from sb3_pgplus.sb3_files import algorithm_of


def convert(source: Path, target: Path, algo: str | None = None) -> list[str]:
    """
    Load a model, trusting its file, and save it again in this package's format. Training goes on from either alike.

    :param source: a file of SB3's PPO or A2C, of sb3-contrib's TRPO, or of this package
    :param target: the new file; ``.zip`` is added if the name has no suffix
    :param algo: name of the algorithm (``"ppoplus"``), by default as the file's attributes say
    :return: what the new file holds as pickles all the same: a user's own classes and functions
    :raises ConfigError: if the algorithm is unknown, or the new file exists
    :raises OSError: if the file cannot be read or written
    :raises ModelFileError: if it is damaged, or another algorithm's
    """
    target = target if target.suffix else target.with_name(f"{target.name}.zip")
    if target.exists():
        raise ConfigError(f"{target} exists, and is not overwritten: choose another name")
    if algo is None:
        stock = algorithm_of(read(source).data)
        if stock is None:
            raise ConfigError(
                f"{source} is not, as far as its attributes say, of this package, of SB3's PPO or A2C, or of "
                "sb3-contrib's TRPO, and no other can be converted; if it is, say which with --algo"
            )
        algo = f"{stock}plus".lower()
    algorithm_class(algo).load(source, device="cpu").save(target)
    return pickled_attributes(target)
