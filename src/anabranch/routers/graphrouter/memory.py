"""Mode ``plus`` at rest, in numpy: stored queries with their edges, the sums that make profiles, and predictions from them.

An edge more changes a few columns of the profiles and one stored row: O(d), whatever the size of the graph. Queries that were fitted and
queries observed since are stored apart, and neighbours are sought in both: a stream of single edges does not push out what is known fully.
"""
# Shapes: N stored queries, Q asked ones, M models, C = 1 + M columns (level, models), F = T + K parts of both banks, J neighbours, A width

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.graphrouter.centre import centred
from anabranch.routers.graphrouter.neighbours import Neighbours
from anabranch.routers.graphrouter.nodes import softmax
from anabranch.routers.graphrouter.rows import UP_E, WEIGHT_E, Rows

# Columns kept free for models to come.
SPARE = 8

# Queries at once; those taken out of the profiles at once.
PIECE, OUT = 512, 64
ALL = slice(None)
Columns = slice | list[int]


@dataclass(frozen=True)
class Looked:
    """What the graph says of some queries before anything is added up.

    Attributes:
        sum_2QC: level and what is left of each model, for effect and scaled cost.
        error_QC: standard error of the effect in units of the spread of edges.
        row_QJ: neighbours: fitted rows, then observed ones, which count on from there.
        alpha_QJ: attention to them, 1 for the nearest fitted one.
    """

    sum_2QC: np.ndarray
    error_QC: np.ndarray
    row_QJ: np.ndarray
    alpha_QJ: np.ndarray


class Memory:
    """The graph of mode ``plus``.

    Args:
        learned: arrays of `learned_arrays`.
        mean_2M: mean effect and scaled cost of each model.
        kappa_2: see `centre`.
        k: neighbours, in each of the two stores.
        stores: vectors of fitted queries, and of observed ones.
        num_tasks: T.
        capacity: observed queries that are stored; then the oldest make room.
        columns: room for columns.
    """

    def __init__(
        self,
        learned: Arrays,
        mean_2M: np.ndarray,
        kappa_2: tuple[float, float],
        k: int,
        stores: tuple[Neighbours, Neighbours],
        num_tasks: int,
        capacity: int,
        columns: int,
    ) -> None:
        self.learned, self.mean_2M, self.kappa_2, self.k = learned, mean_2M, kappa_2, k
        self.num_tasks, self.capacity, self.oldest = num_tasks, capacity, 0
        parts, width = num_tasks + len(learned["l.centre_KD"]), learned["l.attend_DA"].shape[1]
        self.fitted, self.observed = (Rows(near, num_tasks, width, columns) for near in stores)
        self.sum_4FC = np.zeros((4, parts, columns))
        # Sums of weight, and of weight times the square of what is left of effects.
        self.square_2C = np.zeros((2, columns))
        self.banks = slice(0, num_tasks), slice(num_tasks, parts)
        bank_F = np.repeat([0, 1], [num_tasks, parts - num_tasks])
        self.caution_2F1 = learned["l.caution_23"][:, bank_F, None].astype(np.float64)
        self.weight_2F1 = learned["l.weight_23"][:, bank_F, None].astype(np.float64)
        self.profile_2FC = np.zeros((2, parts, columns), np.float32)
        self.spread_FC = np.zeros((parts, columns), np.float32)
        self.refresh()

    @classmethod
    def fill(
        cls,
        learned: Arrays,
        mean_2M: np.ndarray,
        kappa_2: tuple[float, float],
        k: int,
        stores: tuple[Neighbours, Neighbours],
        share_NT: np.ndarray,
        value_2NM: np.ndarray,
        capacity: int,
    ) -> "Memory":
        """Of fitted queries, whose vectors are in the first store: share of each task, effects and scaled costs (NaN: no edge)."""
        made = cls(learned, mean_2M, kappa_2, k, stores, share_NT.shape[1], capacity, 1 + mean_2M.shape[1] + SPARE)
        vector_ND, share_NT = stores[0].vector_ND, np.ascontiguousarray(share_NT, np.float32)
        edge_N4C = made._edges(value_2NM, np.zeros((2, len(share_NT))))
        made._absorb(vector_ND, share_NT, edge_N4C)
        made.fitted.fill(share_NT, edge_N4C, made._own(vector_ND))
        return made

    @property
    def num_models(self) -> int:
        """M, those added later too."""
        return self.mean_2M.shape[1]

    @property
    def columns(self) -> int:
        """C."""
        return 1 + self.num_models

    # What a query is

    def parts(self, vector_QD: np.ndarray, share_QT: np.ndarray) -> np.ndarray:
        """phi of both banks side by side, float32 [Q, F]."""
        learned = self.learned
        tasks = softmax(learned["l.sharp_2"][0] * np.log(np.maximum(share_QT, np.float32(1e-6))))
        return np.concatenate([tasks, softmax(learned["l.sharp_2"][1] * (vector_QD @ learned["l.centre_KD"].T))], 1)

    def _own(self, vector_ND: np.ndarray) -> np.ndarray:
        return vector_ND @ self.learned["l.attend_DA"]

    def refresh(self, columns: Columns = ALL) -> None:
        """Make the profiles anew from the sums, of some columns."""
        up_2FC, down_2FC = self.sum_4FC[::2, :, columns], self.sum_4FC[1::2, :, columns]
        self.profile_2FC[:, :, columns] = self.weight_2F1 * up_2FC / (down_2FC + self.caution_2F1)
        self.spread_FC[:, columns] = self.weight_2F1[0] ** 2 / (down_2FC[0] + self.caution_2F1[0])

    # Edges

    def add(self, vector_ND: np.ndarray, share_NT: np.ndarray, value_2NM: np.ndarray, guess_2N: np.ndarray) -> None:
        """Store observed queries with edges.

        Args:
            vector_ND: unit vectors.
            share_NT: how much of each task they are.
            value_2NM: effect and scaled cost of every model; NaN where there is no edge.
            guess_2N: levels expected beforehand.
        """
        models = np.flatnonzero(np.isfinite(value_2NM).any((0, 1)))
        self._store(vector_ND, share_NT, self._edges(value_2NM, guess_2N), [0, *(1 + models).tolist()])

    def _edges(self, value_2NM: np.ndarray, guess_2N: np.ndarray) -> np.ndarray:
        """Gates and weights, float32 [N, 4, columns]."""
        edge_N4C = np.zeros((value_2NM.shape[1], 4, self.sum_4FC.shape[2]), np.float32)
        for head, mean_M in enumerate(self.mean_2M):
            seen_NM = np.isfinite(value_2NM[head])
            excess_NM = np.where(seen_NM, value_2NM[head] - mean_M, 0.0)
            found = centred(excess_NM, seen_NM.astype(float), self.kappa_2[head], guess_2N[head])
            level_N, level_weight_N, left_NM, weight_NM = found
            up, weight = edge_N4C[:, 2 * head], edge_N4C[:, 2 * head + 1]
            up[:, 0], weight[:, 0] = level_N * level_weight_N, level_weight_N
            up[:, 1 : self.columns], weight[:, 1 : self.columns] = left_NM * weight_NM, weight_NM
        return edge_N4C

    def _absorb(
        self, vector_ND: np.ndarray, share_NT: np.ndarray, edge_N4C: np.ndarray, columns: Columns = ALL
    ) -> None:
        """Add gates to the sums, bank after bank, and turn them in place into what both banks leave unsaid."""
        pieces = [slice(at, at + 8 * PIECE) for at in range(0, len(vector_ND), 8 * PIECE)]
        part_NF = np.concatenate(
            [self.parts(vector_ND[piece], share_NT[piece]) for piece in pieces] or [np.zeros((0, 0), np.float32)]
        )
        for bank in self.banks:
            for piece in pieces:
                part_FN = part_NF[piece, bank].T.astype(np.float64)
                for plane in range(4):
                    self.sum_4FC[plane, bank] += part_FN @ edge_N4C[piece, plane]
            self.refresh(columns)
            for piece in pieces:
                self._subtract(part_NF[piece], edge_N4C[piece], bank, -1)
        up_NC, weight_NC = edge_N4C[:, UP_E].astype(np.float64), edge_N4C[:, WEIGHT_E].astype(np.float64)
        self.square_2C += np.stack([weight_NC.sum(0), (up_NC**2 / np.maximum(weight_NC, 1e-9)).sum(0)])

    def _subtract(self, part_NF: np.ndarray, edge_N4C: np.ndarray, bank: slice, sign: int) -> None:
        """In place, from gates (``sign`` -1) or back to them (1), what a bank says."""
        for head in range(2):
            said_NC = part_NF[:, bank] @ self.profile_2FC[head, bank, : edge_N4C.shape[2]]
            edge_N4C[:, 2 * head] += sign * edge_N4C[:, 2 * head + 1] * said_NC

    def gates(self, store: Rows, row_R: np.ndarray) -> np.ndarray:
        """Gates of stored rows as they came, float32 [R, 4, C]: what is stored, and what the banks say of it now."""
        edge_R4C = store.edge_N4C[row_R, :, : self.columns]
        self._subtract(self.parts(store.near.vector_ND[row_R], store.share_NT[row_R]), edge_R4C, ALL, 1)
        return edge_R4C

    def _store(self, vector_ND: np.ndarray, share_NT: np.ndarray, edge_N4C: np.ndarray, columns: list[int]) -> None:
        """Store observed queries while there is room, then in the place of the oldest (what those gave to the profiles stays)."""
        self._absorb(vector_ND, share_NT, edge_N4C, columns)
        room = max(min(self.capacity - len(self.observed), len(vector_ND)), 0)
        made = vector_ND, share_NT, edge_N4C, self._own(vector_ND)
        self.observed.add(*(value[:room] for value in made))
        for row in range(room, len(vector_ND)):
            self.observed.replace(self.oldest, *(value[row] for value in made))
            self.oldest = (self.oldest + 1) % self.capacity

    def levels(self, row_S: np.ndarray, guess_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Level against which one more edge of these queries is held, and what the edge counts: of fitted rows, and (-1) from a guess."""
        kappa = self.kappa_2[0]
        up_S, weight_S = self.gates(self.fitted, row_S)[:, :2, 0].astype(np.float64).T
        stored_S = (row_S >= 0) & (weight_S > 0)
        level_S = np.where(stored_S, up_S / np.where(weight_S > 0, weight_S, 1), guess_S)
        count_S = kappa / np.maximum(1 - np.where(stored_S, weight_S, 0), 1e-6)  # edges + kappa
        return level_S, count_S / (count_S + 1)

    def put(
        self,
        row_S: np.ndarray,
        vector_SD: np.ndarray,
        share_ST: np.ndarray,
        model: int,
        left_S: np.ndarray,
        weight_S: np.ndarray,
    ) -> None:
        """Edges of one model: in fitted rows, or (-1) with the queries, which are stored with them."""
        column, stored_S = 1 + model, row_S >= 0
        edge_S4C = np.zeros((len(row_S), 4, self.sum_4FC.shape[2]), np.float32)
        edge_S4C[:, UP_E, column], edge_S4C[:, WEIGHT_E, column] = left_S * weight_S, weight_S
        old_S4C = edge_S4C[stored_S]
        self._absorb(vector_SD[stored_S], share_ST[stored_S], old_S4C, [column])
        self.fitted.edge_N4C[row_S[stored_S], :2, column] = old_S4C[:, :2, column]
        self._store(vector_SD[~stored_S], share_ST[~stored_S], edge_S4C[~stored_S], [column])

    def spread_C(self) -> np.ndarray:
        """Standard deviation of what is left of an edge, of each column; that of all models where a model has few."""
        weight_C, square_C = self.square_2C[:, : self.columns]
        overall = square_C[1:].sum() / max(weight_C[1:].sum(), 1e-9)
        return np.sqrt((square_C + 10 * overall) / (weight_C + 10))

    # Predictions

    def look(self, vector_QD: np.ndarray, share_QT: np.ndarray, *, without: np.ndarray | None = None) -> Looked:
        """What profiles and neighbours say, queries in pieces.

        Args:
            vector_QD: unit vectors.
            share_QT: how much of each task they are.
            without: fitted rows that the queries are, -1 for none: nothing of them is used.
        """
        found = []
        for at in range(0, max(len(vector_QD), 1), PIECE):
            piece = slice(at, at + PIECE)
            found.append(self._look(vector_QD[piece], share_QT[piece], None if without is None else without[piece]))
        if len(found) == 1:
            return found[0]
        joined = {
            name: np.concatenate([getattr(one, name) for one in found]) for name in ("error_QC", "row_QJ", "alpha_QJ")
        }
        return Looked(sum_2QC=np.concatenate([one.sum_2QC for one in found], 1), **joined)

    def _look(self, vector_QD: np.ndarray, share_QT: np.ndarray, without: np.ndarray | None) -> Looked:
        part_QF, columns = self.parts(vector_QD, share_QT), self.columns
        sum_2QC = np.stack([part_QF @ profile_FC[:, :columns] for profile_FC in self.profile_2FC])
        if without is not None:
            self._take_out(part_QF, without, sum_2QC)
        row_QJ, alpha_QJ, message_Q4C = self._attention(vector_QD, without)
        caution_2, weight_2 = self.learned["l.caution_23"][:, 2], self.learned["l.weight_23"][:, 2]
        for head in range(2):
            sum_2QC[head] += (
                weight_2[head] * message_Q4C[:, 2 * head] / (message_Q4C[:, 2 * head + 1] + caution_2[head])
            )
        spread_QC = part_QF @ self.spread_FC[:, :columns] + weight_2[0] ** 2 / (message_Q4C[:, WEIGHT_E] + caution_2[0])
        return Looked(sum_2QC=sum_2QC, error_QC=np.sqrt(spread_QC), row_QJ=row_QJ, alpha_QJ=alpha_QJ)

    def _attention(
        self, vector_QD: np.ndarray, without: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Neighbours in both stores, attention to them, and the sum of their messages [Q, 4, C]."""
        own_QA1 = self._own(vector_QD)[:, :, None]
        row_QJ, like_QJ = self.fitted.near.search(vector_QD, self.k + (without is not None))
        if without is not None and row_QJ.shape[1]:
            like_QJ = np.where(row_QJ == without[:, None], -np.inf, like_QJ)
            order_QJ = np.argsort(-like_QJ, 1, kind="stable")[:, : self.k]
            row_QJ, like_QJ = np.take_along_axis(row_QJ, order_QJ, 1), np.take_along_axis(like_QJ, order_QJ, 1)
        logit_QJ = like_QJ * self.learned["l.focus"] + (self.fitted.own_NA[row_QJ] @ own_QA1)[..., 0]
        most_Q1 = logit_QJ.max(1, keepdims=True, initial=-1e9)
        alpha_QJ = np.exp(logit_QJ - most_Q1)
        message_Q4C = self.fitted.message(row_QJ, alpha_QJ, self.columns)
        if not len(self.observed):
            return row_QJ, alpha_QJ, message_Q4C
        late_QJ, like_QJ = self.observed.near.search(vector_QD, self.k)
        logit_QJ = like_QJ * self.learned["l.focus"] + (self.observed.own_NA[late_QJ] @ own_QA1)[..., 0]
        # At most as the nearest fitted one.
        late_alpha_QJ = np.exp(np.minimum(logit_QJ - most_Q1, 0))
        message_Q4C = message_Q4C + self.observed.message(late_QJ, late_alpha_QJ, self.columns)
        return (
            np.concatenate([row_QJ, late_QJ + len(self.fitted)], 1),
            np.concatenate([alpha_QJ, late_alpha_QJ], 1),
            message_Q4C,
        )

    def _take_out(self, part_QF: np.ndarray, without: np.ndarray, sum_2QC: np.ndarray) -> None:
        """Profiles as they would be without each query's own row; backwards, what the last bank left, then what the first did."""
        stored = np.flatnonzero(without >= 0)
        for begin in range(0, len(stored), OUT):
            at_R = stored[begin : begin + OUT]
            edge_R4C = self.fitted.edge_N4C[without[at_R], :, : self.columns].astype(np.float64)
            sum_2QC[:, at_R] = 0
            for bank in self.banks[::-1]:
                part_RF = part_QF[at_R, bank].astype(np.float64)
                self._subtract(part_QF[at_R], edge_R4C, bank, 1)
                for head in range(2):
                    gate_RC, weight_RC = edge_R4C[:, 2 * head], edge_R4C[:, 2 * head + 1]
                    up_FC, down_FC = self.sum_4FC[2 * head : 2 * head + 2, bank, : self.columns]
                    up_RFC = up_FC - part_RF[:, :, None] * gate_RC[:, None]
                    up_RFC /= down_FC + self.caution_2F1[head, bank] - part_RF[:, :, None] * weight_RC[:, None]
                    sum_2QC[head, at_R] += np.einsum("rf,rfc->rc", part_RF * self.weight_2F1[head, bank, 0], up_RFC)

    def described(self, vector_QD: np.ndarray, model_MV: np.ndarray) -> np.ndarray:
        """The part of the effect that the description alone says, [Q, M]."""
        return (vector_QD @ self.learned["l.query_DA"]) @ (model_MV @ self.learned["l.describe_VA"]).T

    # Growing, saving

    def add_model(self, mean_2: np.ndarray) -> None:
        """A column more, without edges."""
        self.mean_2M = np.concatenate([self.mean_2M, mean_2[:, None]], 1)
        if self.columns > self.sum_4FC.shape[2]:
            for store in (self.fitted, self.observed):
                store.widen(self.columns)
            room = ((0, 0), (0, 0), (0, self.columns))
            self.sum_4FC, self.profile_2FC = np.pad(self.sum_4FC, room), np.pad(self.profile_2FC, room)
            self.square_2C, self.spread_FC = np.pad(self.square_2C, room[1:]), np.pad(self.spread_FC, room[1:])
        self.refresh()

    def state(self) -> tuple[Arrays, Facts]:
        """All of it."""
        arrays, facts = self.fitted.state("fitted.")
        later_arrays, later_facts = self.observed.state("observed.")
        own = {"mean_2M": self.mean_2M, "sum_4FC": self.sum_4FC, "square_2C": self.square_2C}
        names = {"kappa_2": list(self.kappa_2), "oldest": self.oldest, "num_tasks": self.num_tasks}
        return (
            {**arrays, **later_arrays, **self.learned, **{f"m.{name}": value.copy() for name, value in own.items()}},
            {**facts, **later_facts, **names},
        )

    @classmethod
    def of_state(
        cls,
        arrays: Mapping[str, np.ndarray],
        facts: Facts,
        k: int,
        stores: tuple[Neighbours, Neighbours],
        capacity: int,
    ) -> "Memory":
        """From what `state` gave; ``stores`` are empty."""
        learned = {name: value for name, value in arrays.items() if name.startswith("l.")}
        first, second = facts["kappa_2"]
        sum_4FC = np.array(arrays["m.sum_4FC"])
        made = cls(
            learned,
            np.array(arrays["m.mean_2M"]),
            (first, second),
            k,
            stores,
            facts["num_tasks"],
            capacity,
            sum_4FC.shape[2],
        )
        made.sum_4FC, made.square_2C, made.oldest = sum_4FC, np.array(arrays["m.square_2C"]), facts["oldest"]
        made.fitted.load_state(arrays, facts, "fitted.")
        made.observed.load_state(arrays, facts, "observed.")
        made.refresh()
        return made


def learned_arrays(network: "object") -> Arrays:
    """A trained `PlusNetwork`'s numbers as float32 arrays ``l.*``, exponents and softplus taken."""
    found = {f"l.{name}": value.detach().numpy().astype(np.float32) for name, value in network.named_parameters()}  # type: ignore[attr-defined]
    found["l.sharp_2"], found["l.focus"] = np.exp(found["l.sharp_2"]), np.exp(found["l.focus"])
    found["l.caution_23"] = np.logaddexp(0, found["l.caution_23"]).astype(np.float32)
    return found
