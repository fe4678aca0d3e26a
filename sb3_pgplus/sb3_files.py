"""Files that SB3's PPO and A2C and sb3-contrib's TRPO saved: whose they are, and their settings as ours."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pgplus.errors import ModelFileError

#: Attributes that only this algorithm has among those below it in the list. A file does not say whose it is.
_MARKS: tuple[tuple[str, frozenset[str]], ...] = (
    ("TRPO", frozenset({"cg_max_steps"})),
    ("PPO", frozenset({"clip_range", "n_epochs"})),
    ("A2C", frozenset({"gae_lambda", "n_steps"})),
)
#: An attribute that all files of this package have, those from before there was a mark included.
_OURS = "sb3_exact"


def saved_by_sb3(names: Iterable[str]) -> bool:
    """
    Whether a file without this package's mark is SB3's, and not an early one of ours.

    :param names: of the attributes in it
    """
    return _OURS not in names


def algorithm_of(names: Iterable[str]) -> str | None:
    """
    The algorithm that attributes belong to.

    :param names: of the attributes in a file
    :return: the name of SB3's class, or None if none of the known
    """
    found = set(names)
    return next((algorithm for algorithm, marks in _MARKS if marks <= found), None)


def translated(
    attributes: Mapping[str, Any], algorithm: str, preset: Mapping[str, Any], file_name: str
) -> dict[str, Any]:
    """
    The attributes with which our class goes on as SB3's would: SB3's settings, and what it has not switched off.

    :param attributes: from the file
    :param algorithm: ``"PPO"``, ``"A2C"`` or ``"TRPO"``, which our class stands for
    :param preset: SB3's defaults in our names
    :param file_name: for messages
    :raises ModelFileError: if another algorithm saved the file, or the policy is not one of an actor and a critic
    """
    saved_by = algorithm_of(attributes)
    if saved_by != algorithm:
        whose = f"of {saved_by}" if saved_by else "neither of this package nor of SB3's PPO, A2C or TRPO"
        right = f": load it with {saved_by}Plus" if saved_by else ""
        raise ModelFileError(f"{file_name} is a file {whose}, and this class takes those of {algorithm}{right}")
    policy_class = attributes.get("policy_class")
    if not (isinstance(policy_class, type) and issubclass(policy_class, ActorCriticPolicy)):
        raise ModelFileError(f"{file_name} has the policy {policy_class}, which is no ActorCriticPolicy")
    if "lstm_states" in inspect.signature(policy_class.forward).parameters:
        raise ModelFileError(
            f"{file_name} has the policy {policy_class.__name__}, and recurrent ones are not supported"
        )
    ours = {**preset, **attributes}
    if attributes.get("rollout_buffer_class") in (RolloutBuffer, DictRolloutBuffer):
        ours["rollout_buffer_class"] = None  # what SB3 writes where the user chose none
    if algorithm == "A2C":
        ours |= _rms_prop(attributes.get("policy_kwargs") or {})
    elif algorithm == "TRPO":
        ours["max_grad_norm"] = preset["max_grad_norm"]  # the 0 in the file fills a place of SB3's base class
    return ours


def _rms_prop(policy_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """SB3's A2C keeps its optimiser's settings as the policy's only."""
    eps = (policy_kwargs.get("optimizer_kwargs") or {}).get("eps")
    if policy_kwargs.get("optimizer_class") is th.optim.RMSprop and eps is not None:
        return {"use_rms_prop": True, "rms_prop_eps": eps}
    return {"use_rms_prop": False}  # Adam, or the class in policy_kwargs
