"""A model of the family, TWIN, said again, slowly and in plain torch: one target, one behaviour after the other.

Written from the papers' definitions, on the values of a state dictionary; nothing is shared with `embeddings` but the
batch and the names of the values.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from embeddings.batch import Batch, History
from embeddings.sizes import FeatureSize
from schemas.model import ModelSettings

FIRST = ("item", "category", "position", "interval", "behavior", "scene")
"""The order of these; others come after them, as the settings name them."""
Vectors = dict[str, Tensor]
"""By feature."""


class Chances(NamedTuple):
    """Logarithms of the probability that something happens, and that it does not."""

    of_it: Tensor
    of_none: Tensor

    @property
    def logit(self) -> Tensor:
        return self.of_it - self.of_none


class Definition:
    """TWIN; the others say how they differ. ``state``: float64 leaves by name of a `CtrModel`'s state dictionary."""

    sets = ("shared", "shared", "shared", "shared")
    """Attention of targets and of behaviours, representation of targets and of behaviours."""
    product = True
    left_out: tuple[str, ...] = ()
    whole = False
    alone: str | None = None
    """The role whose use of the tables has gradients; None: both have."""

    tasks: Sequence[tuple[str, float, str | None]] = ()
    """Label, weight, and the task that must happen before; none: the main label alone."""

    recent: ClassVar[dict[str, int]] = {}
    """How many of the latest behaviours of a sequence are pooled by themselves."""

    training = True
    """Predictions are normalised by the batch's own statistics, else by those of the state."""

    def __init__(self, state: dict[str, Tensor], settings: ModelSettings, data: Mapping[str, FeatureSize]) -> None:
        self.state, self.retrieved, self.data = state, settings.retrieved, data
        used = [name for name in settings.feature_names if name not in self.left_out]
        used = [*(name for name in FIRST if name in used), *(name for name in used if name not in FIRST)]
        of = {"item": "item", "position": "behavior", "interval": "behavior"} | {
            name: size.of for name, size in data.items()
        }
        numbers = [name for name in settings.feature_names if name in data and data[name].kind == "number"]
        self.inherent = [name for name in used if of[name] == "item" and name not in numbers]
        self.cross = [name for name in used if of[name] == "behavior" and name not in numbers]
        self.features = self.inherent + self.cross
        self.numbers = [name for name in numbers if of[name] in ("item", "behavior")]
        self.own_numbers = [name for name in self.numbers if of[name] == "item" or data[name].target]
        self.context = [name for name in used if of[name] in ("user", "impression") and name not in numbers]
        self.context += [name for name in numbers if of[name] in ("user", "impression")]
        self.scored = set(settings.scored_features)
        self.statistics: dict[str, Tensor] = {}
        """Running statistics after the last prediction in training, by name."""

    # Embeddings

    def embed(self, table_set: str, sequence: str, rows: dict[str, int | list[int]]) -> Vectors:
        found = {}
        for feature in self.features:
            place, name = f"inherent.{table_set}", f"{feature}_{table_set}"
            if feature not in self.inherent:
                place, name = "cross", f"{sequence}_{name}"
            found[feature] = self.row(f"tables.{place}.embedding_bags.{name}.weight", rows[feature])
        return found

    def attended(self, table_set: str, sequence: str, rows: dict[str, int | list[int]]) -> Vectors:
        """Of the scored features alone, which are the only ones that a set of attention's own has."""
        kept, self.features = self.features, [feature for feature in self.features if feature in self.scored]
        found = self.embed(table_set, sequence, rows)
        self.features = kept
        return found

    def row(self, table: str, row: int | list[int]) -> Tensor:
        """A row, or the mean of several; of none, zeros."""
        weight = self.state[table]
        if isinstance(row, int):
            return weight[row]
        return weight[row].mean(0) if row else torch.zeros_like(weight[0])

    def value(self, batch: Batch, feature: str, column: Tensor, index: int) -> int | list[int]:
        number = int(column[index])
        if feature not in self.data or self.data[feature].kind != "ids":
            return number
        offset_B1 = batch.bags[feature].offset_B1
        return batch.bags[feature].id_E[offset_B1[number] : offset_B1[number + 1]].tolist()

    def target_rows(self, batch: Batch, t: int) -> dict[str, int | list[int]]:
        rows: dict[str, int | list[int]] = {"item": int(batch.item_T[t]), "position": 0, "interval": 0}
        for feature, size in self.data.items():
            if feature in self.features and size.of == "behavior" and not size.target:
                rows[feature] = [] if size.kind == "ids" else 0
            elif feature in self.features:
                rows[feature] = self.value(batch, feature, batch.features_T[feature], t)
        return rows

    def behavior_rows(self, batch: Batch, history: History, t: int, m: int) -> dict[str, int | list[int]]:
        gone = int(batch.timestamp_T[t]) - int(history.timestamp_M[m])
        rows: dict[str, int | list[int]] = {
            "item": int(history.item_M[m]),
            "position": int(history.end_T[t]) - m,
            "interval": min(33, 1 + math.floor(math.log2(1 + max(0, gone)))),
        }
        others = [feature for feature in self.features if feature in self.data]
        return rows | {feature: self.value(batch, feature, history.features_M[feature], m) for feature in others}

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.state.get(f"{name}.bias")
        return self.state[f"{name}.weight"] @ x + (0 if bias is None else bias)

    def joined(self, vectors: Vectors) -> Tensor:
        return torch.cat([vectors[feature] for feature in self.features if feature in vectors])

    def used_for(self, role: str, vectors: Vectors) -> Vectors:
        if self.alone in (None, role):
            return vectors
        return {feature: vector.detach() for feature, vector in vectors.items()}

    # What models differ in

    def scaled_product(self, q: Vectors, k: Vectors) -> Tensor:
        inherent = [feature for feature in self.inherent if feature in q]
        score = torch.zeros((), dtype=torch.float64)
        for part in [inherent, *[[feature] for feature in self.cross if feature in q]]:
            dim = sum(len(q[feature]) for feature in part)
            score = score + sum(q[feature] @ k[feature] for feature in part) / math.sqrt(dim)
        return score

    def score(self, q: Vectors, k: Vectors) -> Tensor:
        return self.scaled_product(q, k)

    def search_score(self, q: Vectors, k: Vectors) -> Tensor:
        return self.score(q, k)

    def target_map(self, v: Vectors) -> Vectors:
        return v

    def behavior_map(self, e: Vectors) -> Vectors:
        return e

    def retrieve(self, batch: Batch, sequence: str, t: int) -> dict[int, float]:
        """Behaviours in the order found, with the logarithm of how many each stands for."""
        history = batch.histories[sequence]
        q = self.attended(self.sets[0], sequence, self.target_rows(batch, t))
        scored = []
        for m, extra in self.candidates(batch, sequence, t).items():
            k = self.attended(self.sets[1], sequence, self.behavior_rows(batch, history, t, m))
            scored.append((-(float(self.search_score(q, k).detach()) + extra), m, extra))
        return {m: extra for _, m, extra in sorted(scored)[: self.retrieved[sequence]]}

    def candidates(self, batch: Batch, sequence: str, t: int) -> dict[int, float]:
        history = batch.histories[sequence]
        return dict.fromkeys(range(int(history.start_T[t]), int(history.end_T[t])), 0.0)

    def pooled(self, scores: list[Tensor], kept: dict[int, float], vectors: list[Vectors], v: Vectors) -> Tensor:
        weight = torch.stack([score + extra for score, extra in zip(scores, kept.values(), strict=True)]).softmax(0)
        return sum(w * self.joined(e) for w, e in zip(weight, vectors, strict=True))

    def whole_pooled(self, scores: list[Tensor], kept: dict[int, float], vectors: list[Vectors], v: Vectors) -> Tensor:
        return self.pooled(scores, kept, vectors, v)

    def pooled_numbers(
        self, scores: list[Tensor], kept: dict[int, float], vectors: list[Vectors], numbers: list[Tensor]
    ) -> Tensor:
        weight = torch.stack([score + extra for score, extra in zip(scores, kept.values(), strict=True)]).softmax(0)
        return sum(w * x for w, x in zip(weight, numbers, strict=True))

    def whole_pooled_numbers(
        self, scores: list[Tensor], kept: dict[int, float], vectors: list[Vectors], numbers: list[Tensor]
    ) -> Tensor:
        return self.pooled_numbers(scores, kept, vectors, numbers)

    def nothing_of_numbers(self, whole: bool) -> Tensor:
        return torch.zeros(len(self.numbers), dtype=torch.float64)

    # The prediction

    def number(self, column: Tensor, index: int) -> Tensor:
        return column[index].double()[None]

    def of_context(self, batch: Batch, t: int) -> list[Tensor]:
        found = []
        for feature in self.context:
            of_user = self.data[feature].of == "user"
            column, index = (batch.features_U, int(batch.user_T[t])) if of_user else (batch.features_T, t)
            if self.data[feature].kind == "number":
                found.append(self.number(column[feature], index))
            else:
                table = f"tables.context.embedding_bags.{feature}_context.weight"
                found.append(self.row(table, self.value(batch, feature, column[feature], index)))
        return found

    def inputs(self, batch: Batch, t: int, whole: bool) -> Tensor:
        parts, of_histories = [], []
        for sequence in self.retrieved:
            history = batch.histories[sequence]
            shown = self.target_rows(batch, t)
            q = self.used_for("attention", self.attended(self.sets[0], sequence, shown))
            v = self.target_map(self.used_for("representation", self.embed(self.sets[2], sequence, shown)))
            everything = self.candidates_all(batch, sequence, t)
            kept = everything if whole or self.whole else self.retrieve(batch, sequence, t)
            scores, vectors, numbers = [], [], []
            for m in kept:
                rows = self.behavior_rows(batch, history, t, m)
                k = self.used_for("attention", self.attended(self.sets[1], sequence, rows))
                scores.append(self.whole_score(q, k) if whole else self.score(q, k))
                e = self.used_for("representation", self.embed(self.sets[3], sequence, rows))
                vectors.append(self.behavior_map(e))
                if self.numbers:
                    numbers.append(torch.cat([self.number(history.features_M[name], m) for name in self.numbers]))
            pool = self.whole_pooled if whole else self.pooled
            h = pool(scores, kept, vectors, v) if kept else self.nothing(v, whole)
            if not parts:
                parts += [v[feature] for feature in self.inherent]
            parts += [v[feature] for feature in self.cross]
            parts += [h, h * self.joined(v)] if self.product else [h]
            if self.numbers:
                pool = self.whole_pooled_numbers if whole else self.pooled_numbers
                of_histories.append(pool(scores, kept, vectors, numbers) if kept else self.nothing_of_numbers(whole))
        if not whole:
            for sequence, count in self.recent.items():
                v, h, x = self.latest(batch, sequence, t, count)
                parts += [h, h * self.joined(v)] if self.product else [h]
                of_histories += [x] if self.numbers else []
        own = [self.number(batch.features_T[name], t) for name in self.own_numbers]
        return torch.cat([*parts, *own, *of_histories, *self.of_context(batch, t)])

    def latest(self, batch: Batch, sequence: str, t: int, count: int) -> tuple[Vectors, Tensor, Tensor]:
        """The target, and the latest ``count`` behaviours of its window, pooled as those that are retrieved are."""
        history, shown = batch.histories[sequence], self.target_rows(batch, t)
        q = self.used_for("attention", self.attended(self.sets[0], sequence, shown))
        v = self.target_map(self.used_for("representation", self.embed(self.sets[2], sequence, shown)))
        end = int(history.end_T[t])
        kept = dict.fromkeys(range(max(int(history.start_T[t]), end - count), end), 0.0)
        if not kept:
            return v, self.nothing(v, False), self.nothing_of_numbers(False)
        rows = [self.behavior_rows(batch, history, t, m) for m in kept]
        keys = [self.used_for("attention", self.attended(self.sets[1], sequence, each)) for each in rows]
        values = [self.used_for("representation", self.embed(self.sets[3], sequence, each)) for each in rows]
        vectors, scores = [self.behavior_map(value) for value in values], [self.score(q, k) for k in keys]
        nothing = torch.zeros(0, dtype=torch.float64)
        numbers = [
            torch.cat([nothing, *(self.number(history.features_M[name], m) for name in self.numbers)]) for m in kept
        ]
        return v, self.pooled(scores, kept, vectors, v), self.pooled_numbers(scores, kept, vectors, numbers)

    def candidates_all(self, batch: Batch, sequence: str, t: int) -> dict[int, float]:
        return Definition.candidates(self, batch, sequence, t)

    def whole_score(self, q: Vectors, k: Vectors) -> Tensor:
        return self.score(q, k)

    def nothing(self, v: Vectors, whole: bool) -> Tensor:
        return torch.zeros_like(self.joined(v))

    def normalised(self, first: str, x_TI: Tensor) -> Tensor:
        running = {
            "mean": self.state[f"{first}.running_mean_F"],
            "variance": self.state[f"{first}.running_variance_F"],
        }
        statistics = running
        if self.training and len(x_TI) > 1:
            statistics = {"mean": x_TI.mean(0), "variance": x_TI.var(0, unbiased=False)}
            unbiased = {"mean": x_TI.mean(0), "variance": x_TI.var(0, unbiased=True)}
            for kind, value in unbiased.items():
                self.statistics[f"{first}.running_{kind}_F"] = (0.9 * running[kind] + 0.1 * value).detach()
        x = (x_TI - statistics["mean"]) / torch.sqrt(statistics["variance"] + 1e-5)
        return x * self.state[f"{first}.weight"] + self.state[f"{first}.bias"]

    def perceptron(self, name: str, x_TI: Tensor) -> Tensor:
        x, layer = self.normalised(f"{name}.layers.0", x_TI), 1
        while f"{name}.layers.{layer + 1}.weight" in self.state:
            x = x @ self.state[f"{name}.layers.{layer}.weight"].T + self.state[f"{name}.layers.{layer}.bias"]
            slope = self.state[f"{name}.layers.{layer + 1}.weight"]
            x = torch.where(x > 0, x, slope * x)
            layer += 2
        last = self.state[f"{name}.layers.{layer}.weight"], self.state[f"{name}.layers.{layer}.bias"]
        return x @ last[0].squeeze(0) + last[1]

    def mixed(self, name: str, task: int, x_TI: Tensor) -> Tensor:
        """What a task's gate lets through of the experts, target by target (Ma et al., KDD 2018, equations 5 and 6)."""
        normal, mixed = self.normalised(f"{name}.norm", x_TI), []
        for x in normal:
            gate = (self.state[f"{name}.gates.{task}.weight"] @ x).exp()
            total = torch.zeros((), dtype=torch.float64)
            for expert, share in enumerate(gate / gate.sum()):
                y, layer = x, 0
                while f"{name}.experts.{expert}.{layer}.weight" in self.state:
                    y = self.linear(f"{name}.experts.{expert}.{layer}", y)
                    y = torch.where(y > 0, y, self.state[f"{name}.experts.{expert}.{layer + 1}.weight"] * y)
                    layer += 2
                total = total + share * y
            mixed.append(total)
        return torch.stack(mixed)

    def chances(self, name: str, x_TI: Tensor) -> list[Chances]:
        """Each task's; that of a task after another one happens where both do (ESMM)."""

        def of(name: str, seen: Tensor) -> Chances:
            logit = self.perceptron(name, seen)
            return Chances(logsigmoid(logit), logsigmoid(-logit))

        if f"{name}.layers.0.weight" in self.state:
            return [of(name, x_TI)]
        found: dict[str, Chances] = {}
        for number, (task, _, after) in enumerate(self.tasks or [("label", 1.0, None)]):
            mixed = f"{name}.mixture.norm.weight" in self.state
            seen = self.mixed(f"{name}.mixture", number, x_TI) if mixed else x_TI
            found[task] = of(f"{name}.heads.{number}", seen)
            if after is not None:
                both, first = found[after].of_it + found[task].of_it, found[after]
                found[task] = Chances(both, torch.logaddexp(first.of_none, first.of_it + found[task].of_none))
        return list(found.values())

    def predictions(self, batch: Batch) -> list[list[Chances]]:
        """The tasks' chances: the prediction's, and in training the auxiliary prediction's."""
        found = []
        for name, whole in (("prediction", False), ("auxiliary", True)):
            if any(key.startswith(f"{name}.") for key in self.state) and (self.training or not whole):
                x_TI = torch.stack([self.inputs(batch, t, whole) for t in range(len(batch))])
                found.append(self.chances(name, x_TI))
        return found

    def logits(self, batch: Batch) -> list[Tensor]:
        """The main task's: the prediction's, and in training the auxiliary prediction's if there is one."""
        return [of_tasks[0].logit for of_tasks in self.predictions(batch)]

    def loss(self, batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        weight_T = (torch.ones(len(batch)) if batch.weight_T is None else batch.weight_T).double()
        for of_tasks in self.predictions(batch):
            tasks = self.tasks or [(next(iter(batch.labels_T)), 1.0, None)]
            for (task, weight, _), chances in zip(tasks, of_tasks, strict=True):
                above, below = [], []
                for label, share, log_p, log_q in zip(batch.labels_T[task], weight_T, *chances, strict=True):
                    if label >= 0:
                        above.append(-share * (log_p if label else log_q))
                        below.append(share)
                total = total + weight * sum(above) / sum(below)
        return total

    def learn(self, batch: Batch) -> None:
        """Leave all gradients in ``state``."""
        self.loss(batch).backward()
