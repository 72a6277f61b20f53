"""`fpe info`: versions, devices, attention backends, the embedded models and their words, and the methods."""

from __future__ import annotations

from ..errors import InputError
from ..texts import print_text

__all__ = ["run"]


def run(method: str | None = None) -> None:
    """Print what this installation can do; of a method, its options.

    Raises:
        InputError: there is no such method.
    """
    if method is not None:
        print_text(described(method))
        return
    import torch

    from fpe_kernels import backends

    from ..edits.registry import METHODS
    from ..embedded.scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS
    from ..models.loading import NAMES, find_model
    from ..runs.repeatable import versions

    for name, version in versions().items():
        print(f"{name:<14}{version or 'not installed'}")
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"{'devices':<14}{', '.join([f'cpu ({torch.get_num_threads()} threads)', *cuda])}")
    print("backends")
    for name, state in backends().items():
        print(f"  {name:<12}{state}")
    print("models")
    for name in NAMES:
        try:
            print_text(f"  {name:<14}{find_model(name).location}")
        except InputError as error:
            print(f"  {name:<14}{error}")
    for title, names in (("objects", OBJECTS), ("colours", COLOURS), ("backgrounds", BACKGROUNDS)):
        print(f"  {title:<12}{', '.join(names)}")
    print("methods (fpe info --method NAME says what their options do)")
    for name, entry in METHODS.items():
        print(f"  {name:<15}{entry.title}: {', '.join(entry.options)}")


def described(method: str) -> str:
    """A method and its options, a line each."""
    from ..edits.registry import find_method

    try:
        return find_method(method).describe()
    except ValueError as error:
        raise InputError(str(error)) from error
