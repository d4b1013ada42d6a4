"""What LoRA adapters change in the tensors that are merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expert_merging.checkpoints.adapter import Adapter
from expert_merging.checkpoints.lora import Change
from expert_merging.errors import InputError, Problems, first_of
from expert_merging.low_rank.factors import Factors
from expert_merging.plan import Plan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Changes:
    """How the tensors that are merged differ from the base's.

    Args:
        adapters: the experts.
        products: changes that are a product of two factors in every expert that has one, by tensor and expert.
        others: tensors that some expert has trained otherwise, as a whole for instance.
    """

    adapters: Mapping[str, Adapter]
    products: Mapping[str, Mapping[str, Change]]
    others: tuple[str, ...]

    @classmethod
    def of(cls, plan: Plan, method: str) -> Changes:
        """Find out what is changed, from headers alone.

        Args:
            plan: checkpoints and parameters.
            method: who asks, for messages.

        Raises:
            InputError: an expert is no LoRA adapter without norms of its own.
        """
        adapters, problems = dict[str, Adapter](), Problems()
        for name, expert in plan.experts.items():
            if not isinstance(expert, Adapter):
                problems.add(_refusal(method, f"expert {name} ({expert.folder}) is a full model"))
            elif expert.settings.dora:
                problems.add(_refusal(method, f"expert {name} ({expert.folder}) has norms of its own (use_dora)"))
            else:
                adapters[name] = expert
        problems.check()
        products, others = dict[str, Mapping[str, Change]](), list[str]()
        for name in plan.merged:
            changed = [expert for expert, adapter in adapters.items() if adapter.changes(name)]
            found = {expert: change for expert in changed if (change := adapters[expert].product(name))}
            if len(found) < len(changed):
                others.append(name)
            elif found:
                products[name] = found
        if not products:
            problems.add(
                f"no adapter changes a parameter that is merged by a product of two factors; {method} has nothing to do"
                + (f" ({first_of(others, 1)} is trained as a whole)" if others else "")
            )
        problems.check()
        return cls(adapters, products, tuple(others))

    def factors(self, name: str, device: torch.device) -> dict[str, Factors]:
        """What each expert that changes a tensor adds to it, in float64, the scale in the left factor.

        Raises:
            InputError: an expert has NaN or infinite values.
        """
        import torch

        found = {}
        for expert, change in self.products[name].items():
            read = self.adapters[expert].numbers
            assert change.right is not None  # noqa: S101  (it is a product)
            left = change.left.whole(read).to(device).double() * change.scale
            right = change.right.whole(read).to(device).double()
            if not left.norm() * right.norm() <= torch.finfo(torch.float32).max:  # no number in it is larger
                raise InputError(
                    f"expert {expert} has NaN or infinite values in its change of {name}; download it again"
                )
            found[expert] = Factors(left, right)
        return found

    def ranks(self, name: str) -> list[int]:
        """Rank of each expert's factors of a tensor."""
        return [change.left.shape[1] for change in self.products[name].values()]

    @property
    def most(self) -> int:
        """Largest rank of any expert's factors."""
        return max(rank for name in self.products for rank in self.ranks(name))

    def largest_rank(self, name: str, **_options: Any) -> int:
        """Rank that no sum of the experts' changes of a tensor exceeds."""
        return min(sum(self.ranks(name)), *self.shape(name))

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of a tensor as a matrix."""
        change = next(iter(self.products[name].values()))
        assert change.right is not None  # noqa: S101  (it is a product)
        return change.left.shape[0], change.right.shape[1]

    def common_rank(self, name: str, **_options: Any) -> int:
        """Rank of the factors of a tensor where experts have the same one."""
        return self.ranks(name)[0]

    def check_equal_ranks(self, who: str) -> None:
        """Check that factors can be added to one another.

        Args:
            who: who adds them, for messages.

        Raises:
            InputError: they have several ranks.
        """
        for name, found in self.products.items():
            if len(set(self.ranks(name))) > 1:
                pairs = zip(found, self.ranks(name), strict=True)
                raise InputError(
                    f"{who} merges factors of one rank, and those of {name} have "
                    f"{', '.join(f'{rank} ({expert})' for expert, rank in pairs)}; choose a method for several ranks, "
                    "such as core_space"
                )

    def is_turned(self, name: str) -> bool:
        """Whether inputs are a tensor's rows, so that its left factor is fed them."""
        return next(iter(self.products[name].values())).left.transposed


def _refusal(method: str, what: str) -> str:
    return (
        f"{what}, and {method} merges LoRA adapters by their factors; use a method for full models, such as svd or ties"
    )
