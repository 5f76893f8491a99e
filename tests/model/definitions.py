"""Every other model of the family, by how it differs from `tests.model.definition.Definition`."""

import math

import torch
from torch import Tensor, nn

from embeddings.batch import Batch
from tests.model.definition import Definition, Vectors


class Dare(Definition):
    sets = ("attention", "attention", "representation", "representation")


class DareNoTr(Dare):
    product = False


class DareThreeTables(Dare):
    sets = ("target_attention", "history_attention", "representation", "representation")


class Twin4E(Definition):
    sets = ("target_attention", "history_attention", "target_representation", "history_representation")


class TwinNoTr(Definition):
    product = False


class TwinGradientNormalization(Definition):
    def learn(self, batch: Batch) -> None:
        # Those that both roles read.
        both = ("tables.inherent.", "tables.cross.")
        tables = [weight for name, weight in self.state.items() if name.startswith(both) and weight.requires_grad]
        sides = []
        for role in ("attention", "representation"):
            self.alone = role
            sides.append(torch.autograd.grad(self.loss(batch), tables, materialize_grads=True))
        self.alone = None
        super().learn(batch)
        for weight, attention, representation in zip(tables, *sides, strict=True):
            scale = representation.norm() / attention.norm() if attention.norm() > 0 else 1
            weight.grad = attention * scale + representation


class TwinHard(Definition):
    """The K latest of the target's category; if they are fewer, the latest of the others fill the rest."""

    filled = True

    def retrieve(self, batch: Batch, sequence: str, t: int) -> dict[int, float]:
        history = batch.histories[sequence]
        window = range(int(history.start_T[t]), int(history.end_T[t]))
        same = [m for m in reversed(window) if history.features_M["category"][m] == batch.features_T["category"][t]]
        others = (
            [m for m in reversed(window) if history.features_M["category"][m] != batch.features_T["category"][t]]
            if self.filled
            else []
        )
        return dict.fromkeys([*same, *others][: self.retrieved[sequence]], 0.0)


class Maps(Definition):
    mapped: tuple[str, ...] | None = None
    """None: all of them."""
    output: int | None = None

    def through(self, name: str, vectors: Vectors) -> Vectors:
        features = [name for name in self.features if name in vectors and (not self.mapped or name in self.mapped)]
        x, layer = torch.cat([vectors[feature] for feature in features]), 0
        while True:
            x = self.linear(f"{name}.layers.{layer}", x)
            if f"{name}.layers.{layer + 1}.weight" not in self.state:
                break
            x = torch.where(x > 0, x, self.state[f"{name}.layers.{layer + 1}.weight"] * x)
            layer += 2
        parts = x.split([self.output or len(vectors[feature]) for feature in features])
        return vectors | dict(zip(features, parts, strict=True))

    def score(self, q: Vectors, k: Vectors) -> Tensor:
        return self.scaled_product(self.through("scoring.of_target", q), self.through("scoring.of_behavior", k))

    def target_map(self, v: Vectors) -> Vectors:
        return self.through("target_map", v)

    def behavior_map(self, e: Vectors) -> Vectors:
        return self.through("behavior_map", e)


class MapsNoItem(Maps):
    mapped = ("category", "position")


class MapsPosition(Maps):
    mapped = ("position",)


class MapsCategory(Maps):
    mapped = ("category",)


class MapsItem(Maps):
    mapped = ("item",)


class MapsSmall(Maps):
    output = 16


class Din(Definition):
    left_out = ("position",)

    def score(self, q: Vectors, k: Vectors) -> Tensor:
        q, k = self.joined(q), self.joined(k)
        hidden = self.linear("scoring.layers.0", torch.cat([q, k, q - k, q * k]) / len(q))
        hidden = torch.where(hidden > 0, hidden, self.state["scoring.layers.1.weight"] * hidden)
        return self.linear("scoring.layers.2", hidden).squeeze(0)


class DinShort(Din):
    def retrieve(self, batch: Batch, sequence: str, t: int) -> dict[int, float]:
        window = self.candidates(batch, sequence, t)
        return dict.fromkeys(list(reversed(window))[: self.retrieved[sequence]], 0.0)


class Eta(Definition):
    def bits(self, vectors: Vectors) -> list[bool]:
        x = torch.cat([vectors[feature] for feature in self.inherent if feature in self.scored])
        return (self.state["signature.directions.weight"] @ x > 0).tolist()

    def search_score(self, q: Vectors, k: Vectors) -> Tensor:
        distance = sum(one != other for one, other in zip(self.bits(q), self.bits(k), strict=True))
        return torch.tensor(-float(distance))


class Sdim(Eta):
    whole, width = True, 3

    def inputs(self, batch: Batch, t: int, whole: bool) -> Tensor:
        self.q_bits = self.bits(self.attended("shared", next(iter(self.retrieved)), self.target_rows(batch, t)))
        return super().inputs(batch, t, whole)

    def pooled(self, scores: list[Tensor], kept: dict[int, float], vectors: list[Vectors], v: Vectors) -> Tensor:
        total, rounds = torch.zeros_like(self.joined(v)), len(self.q_bits) // self.width
        for r in range(rounds):
            part = slice(r * self.width, (r + 1) * self.width)
            bucket = [self.joined(e) for e in vectors if self.bits(e)[part] == self.q_bits[part]]
            if bucket:
                total = total + sum(bucket) / sum(bucket).norm() / rounds
        return total

    def pooled_numbers(
        self, scores: list[Tensor], kept: dict[int, float], vectors: list[Vectors], numbers: list[Tensor]
    ) -> Tensor:
        total, rounds = self.nothing_of_numbers(False), len(self.q_bits) // self.width
        for r in range(rounds):
            part = slice(r * self.width, (r + 1) * self.width)
            both = zip(vectors, numbers, strict=True)
            bucket = [x for e, x in both if self.bits(e)[part] == self.q_bits[part]]
            total = total + (sum(bucket) / len(bucket) / rounds if bucket else 0)
        return total


class SimHard(TwinHard):
    filled, product, heads = False, False, 2

    def score(self, q: Vectors, k: Vectors) -> Tensor:
        q = self.linear("scoring.of_target", self.joined(q)).chunk(self.heads)
        k = self.linear("scoring.of_behavior", self.joined(k)).chunk(self.heads)
        return torch.stack([a @ b / math.sqrt(len(a)) for a, b in zip(q, k, strict=True)])

    def nothing(self, v: Vectors, whole: bool) -> Tensor:
        return torch.zeros_like(self.joined(v)).repeat(self.heads)

    def nothing_of_numbers(self, whole: bool) -> Tensor:
        return super().nothing_of_numbers(whole).repeat(self.heads)

    def pooled_numbers(
        self, scores: list[Tensor], kept: dict[int, float], vectors: list[Vectors], numbers: list[Tensor]
    ) -> Tensor:
        weight = torch.stack(scores).softmax(0)
        return torch.cat([weight[:, head] @ torch.stack(numbers) for head in range(self.heads)])

    def pooled(self, scores: list[Tensor], kept: dict[int, float], vectors: list[Vectors], v: Vectors) -> Tensor:
        weight = torch.stack(scores).softmax(0)
        parts = [self.inherent, *[[feature] for feature in self.cross]]
        found = []
        for part in parts:
            for h in range(self.heads):
                rows = [torch.cat([e[feature] for feature in part]) for e in vectors]
                found.append(sum(w[h] * row for w, row in zip(weight, rows, strict=True)))
        return torch.cat(found)


class SimSoft(SimHard):
    def whole_score(self, q: Vectors, k: Vectors) -> Tensor:
        q = {**q, **Maps.through(self, "searching.of_target", q)}  # type: ignore[arg-type]
        return self.scaled_product(q, Maps.through(self, "searching.of_behavior", k))  # type: ignore[arg-type]

    mapped, output = None, None

    def whole_pooled_numbers(
        self, scores: list[Tensor], kept: dict[int, float], vectors: list[Vectors], numbers: list[Tensor]
    ) -> Tensor:
        return sum(score * x for score, x in zip(scores, numbers, strict=True))

    def search_score(self, q: Vectors, k: Vectors) -> Tensor:
        return self.whole_score(q, k)

    def retrieve(self, batch: Batch, sequence: str, t: int) -> dict[int, float]:
        return Definition.retrieve(self, batch, sequence, t)

    def whole_pooled(self, scores: list[Tensor], kept: dict[int, float], vectors: list[Vectors], v: Vectors) -> Tensor:
        return sum(score * self.joined(e) for score, e in zip(scores, vectors, strict=True))

    def nothing(self, v: Vectors, whole: bool) -> Tensor:
        return torch.zeros_like(self.joined(v)).repeat(1 if whole else self.heads)

    def nothing_of_numbers(self, whole: bool) -> Tensor:
        return Definition.nothing_of_numbers(self, whole).repeat(1 if whole else self.heads)


class TwinV2(Definition):
    size = 3

    def candidates(self, batch: Batch, sequence: str, t: int) -> dict[int, float]:
        history = batch.histories[sequence]
        table = self.state["tables.inherent.shared.embedding_bags.item_shared.weight"]
        window = list(range(int(history.start_T[t]), int(history.end_T[t])))
        point = {m: table[int(history.item_M[m])].detach() for m in window}
        found = {}
        for cluster in self.split(window, point):
            middle = torch.stack([point[m] for m in cluster]).mean(0)
            found[self.most(cluster, [-float((point[m] - middle).square().sum()) for m in cluster])] = math.log(
                len(cluster)
            )
        return found

    def most(self, cluster: list[int], values: list[float]) -> int:
        """The earliest of those that are as far as the farthest, up to 1 in 10,000."""
        limit = max(values) - 1e-4 * abs(max(values))
        return min(m for m, value in zip(cluster, values, strict=True) if value >= limit)

    def split(self, cluster: list[int], point: dict[int, Tensor]) -> list[list[int]]:
        if len(cluster) <= self.size:
            return [cluster] if cluster else []

        def farthest(there: Tensor) -> int:
            return self.most(cluster, [float((point[m] - there).square().sum()) for m in cluster])

        one = farthest(torch.stack([point[m] for m in cluster]).mean(0))
        other = farthest(point[one])
        along = sorted(cluster, key=lambda m: (float(point[m] @ (point[other] - point[one])), m))
        half = (len(cluster) + 1) // 2
        return [*self.split(sorted(along[:half]), point), *self.split(sorted(along[half:]), point)]


DEFINITIONS: dict[str, type[Definition]] = {
    "dare": Dare,
    "dare-no-tr": DareNoTr,
    "dare-three-tables": DareThreeTables,
    "twin": Definition,
    "twin-duplicated": Definition,
    "twin-4e": Twin4E,
    "twin-no-tr": TwinNoTr,
    "twin-hard": TwinHard,
    "twin-v2": TwinV2,
    "twin-projection": Maps,
    "twin-projection-shared": Maps,
    "twin-projection-no-item": MapsNoItem,
    "twin-projection-position": MapsPosition,
    "twin-gradient-normalization": TwinGradientNormalization,
    "twin-projection-category": MapsCategory,
    "twin-projection-item": MapsItem,
    "twin-projection-small": MapsSmall,
    "twin-mlp-1": Maps,
    "twin-mlp-2": Maps,
    "din": Din,
    "din-short": DinShort,
    "eta": Eta,
    "sdim": Sdim,
    "sim-hard": SimHard,
    "sim-soft": SimSoft,
}


def definition_of(model: nn.Module) -> Definition:
    """The definition of a model, with its values."""
    learning = {weight.data_ptr() for weight in model.parameters() if weight.requires_grad}
    leaves: dict[int, Tensor] = {}  # a value that has two names is one leaf
    state = {}
    for name, value in model.state_dict().items():
        leaf = value.detach().double().clone().requires_grad_(value.data_ptr() in learning)
        state[name] = leaves.setdefault(value.data_ptr(), leaf)
    definition = DEFINITIONS[model.settings.name](state, model.settings, model.sizes.features)
    definition.recent = model.settings.recent  # type: ignore[misc]
    definition.tasks = [(task.name, task.weight, task.after) for task in model.settings.tasks]
    return definition
