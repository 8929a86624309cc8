"""Mode ``plus`` at rest, in numpy: stored queries with their edges, the sums that make profiles, and predictions from them.

What is stored of an edge is what both banks left unsaid of it when it came: the neighbours' message.

An edge more changes two columns of the profiles and one row of the store: O(d), whatever the size of the graph.
"""
# Shapes: N stored queries, Q asked ones, M models, C = 1 + M columns (level, models), F = T + K parts of both banks, J neighbours, A width

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from anabranch.gateway.graphrouter.centre import centred
from anabranch.gateway.graphrouter.neighbours import Neighbours, with_room
from anabranch.gateway.graphrouter.nodes import softmax
from anabranch.gateway.strategy import Arrays, Facts

SPARE = 8  # columns kept free for models to come
PIECE = 512  # queries at once
ALL = slice(None)
Columns = slice | list[int]
UP_E, WEIGHT_E, UP_C, WEIGHT_C = range(4)  # planes of the store: gate and weight, of effect and of cost


@dataclass(frozen=True)
class Looked:
    """What the graph says of some queries before anything is added up.

    Attributes:
        sum_2QC: level and what is left of each model, for effect and scaled cost.
        error_QC: standard error of the effect in units of the spread of edges.
        row_QJ: neighbours.
        alpha_QJ: attention to them, 1 for the nearest.
        part_QF: phi.
    """

    sum_2QC: np.ndarray
    error_QC: np.ndarray
    row_QJ: np.ndarray
    alpha_QJ: np.ndarray
    part_QF: np.ndarray


class Memory:
    """The graph of mode ``plus``.

    Args:
        learned: arrays of `learned_arrays`.
        mean_2M: mean effect and scaled cost of each model.
        kappa_2: see `centre`.
        k: neighbours.
        near: an empty store of vectors.
        num_tasks: T.
        capacity: rows; beyond it, what was observed first is forgotten first (never what was fitted).
    """

    def __init__(
        self,
        learned: Arrays,
        mean_2M: np.ndarray,
        kappa_2: tuple[float, float],
        k: int,
        near: Neighbours,
        num_tasks: int,
        capacity: int,
    ) -> None:
        self.learned, self.mean_2M, self.kappa_2, self.k, self.near, self.capacity = (
            learned,
            mean_2M,
            kappa_2,
            k,
            near,
            capacity,
        )
        self.num_tasks = num_tasks
        parts = num_tasks + len(learned["l.centre_KD"])
        columns = 1 + mean_2M.shape[1] + SPARE
        self.edge_N4C = np.zeros((0, 4, columns), np.float32)
        self.share_NT = np.zeros((0, num_tasks), np.float32)
        self.own_NA = np.zeros((0, learned["l.attend_DA"].shape[1]), np.float32)
        self.sum_4FC = np.zeros((4, parts, columns))
        self.square_2C = np.zeros(
            (2, columns)
        )  # sums of weight and of weight times the square of what is left, of effects
        self.fitted, self.oldest = 0, 0
        self.banks = slice(0, num_tasks), slice(num_tasks, parts)
        bank_F = np.repeat([0, 1], [num_tasks, parts - num_tasks])
        self.caution_2F1 = learned["l.caution_23"][:, bank_F, None].astype(np.float64)
        self.weight_2F1 = learned["l.weight_23"][:, bank_F, None].astype(np.float64)
        self.profile_2FC, self.spread_FC = (
            np.zeros((2, parts, columns), np.float32),
            np.zeros((parts, columns), np.float32),
        )
        self.refresh()

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

    def refresh(self, columns: Columns = ALL) -> None:
        """Make the profiles anew from the sums, of some columns."""
        up_2FC, down_2FC = self.sum_4FC[::2, :, columns], self.sum_4FC[1::2, :, columns]
        self.profile_2FC[:, :, columns] = self.weight_2F1 * up_2FC / (down_2FC + self.caution_2F1)
        self.spread_FC[:, columns] = self.weight_2F1[0] ** 2 / (down_2FC[0] + self.caution_2F1[0])

    # Edges

    def take(self, near: Neighbours, share_NT: np.ndarray, value_2NM: np.ndarray) -> None:
        """Fill an empty store with fitted queries, whose vectors are in ``near`` already."""
        self.near, self.fitted = near, len(near)
        self.share_NT = np.ascontiguousarray(share_NT, np.float32)
        self.own_NA = near.vector_ND @ self.learned["l.attend_DA"]
        self.edge_N4C = self._edges(value_2NM, np.zeros((2, len(near))))
        self._absorb(near.vector_ND, self.share_NT, self.edge_N4C)

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
        edge_N4C = np.zeros((value_2NM.shape[1], 4, self.edge_N4C.shape[2]), np.float32)
        for head in range(2):
            seen_NM = np.isfinite(value_2NM[head])
            excess_NM = np.where(seen_NM, value_2NM[head] - self.mean_2M[head], 0.0)
            level_N, level_weight_N, left_NM, weight_NM = centred(
                excess_NM, seen_NM.astype(float), self.kappa_2[head], guess_2N[head]
            )
            edge_N4C[:, 2 * head, 0], edge_N4C[:, 2 * head + 1, 0] = level_N * level_weight_N, level_weight_N
            edge_N4C[:, 2 * head, 1 : self.columns], edge_N4C[:, 2 * head + 1, 1 : self.columns] = (
                left_NM * weight_NM,
                weight_NM,
            )
        return edge_N4C

    def _absorb(
        self, vector_ND: np.ndarray, share_NT: np.ndarray, edge_N4C: np.ndarray, columns: Columns = ALL
    ) -> None:
        """Add gates to the sums, bank after bank, and turn them in place into what both banks leave unsaid."""
        for bank in self.banks:
            for pieces in (True, False):
                for at in range(0, len(vector_ND), 8 * PIECE):
                    piece = slice(at, at + 8 * PIECE)
                    part_NF, edge = self.parts(vector_ND[piece], share_NT[piece])[:, bank], edge_N4C[piece]
                    if pieces:
                        self.sum_4FC[:, bank] += np.einsum(
                            "nf,npc->pfc", part_NF.astype(np.float64), edge, optimize=len(edge) > 1
                        )
                    else:
                        for head in range(2):
                            edge[:, 2 * head] -= edge[:, 2 * head + 1] * (part_NF @ self.profile_2FC[head, bank])
                self.refresh(columns)
        up_NC, weight_NC = edge_N4C[:, UP_E].astype(np.float64), edge_N4C[:, WEIGHT_E].astype(np.float64)
        self.square_2C += np.stack([weight_NC.sum(0), (up_NC**2 / np.maximum(weight_NC, 1e-9)).sum(0)])

    def gates(self, rows: np.ndarray) -> np.ndarray:
        """Gates of stored rows as they came, float32 [rows, 4, C]: what is stored, and what the banks say of it now."""
        edge_R4C = self.edge_N4C[rows, :, : self.columns]
        part_RF = self.parts(self.near.vector_ND[rows], self.share_NT[rows])
        for head in range(2):
            edge_R4C[:, 2 * head] += edge_R4C[:, 2 * head + 1] * (part_RF @ self.profile_2FC[head, :, : self.columns])
        return edge_R4C

    def _store(self, vector_ND: np.ndarray, share_NT: np.ndarray, edge_N4C: np.ndarray, columns: list[int]) -> None:
        """Append rows while there is room, then write over those observed first (what they gave to the profiles stays)."""
        self._absorb(vector_ND, share_NT, edge_N4C, columns)
        begin, count = len(self.near), len(vector_ND)
        room = min(count, max(self.capacity - begin, 0))
        held = (with_room(held, begin + room) for held in (self.edge_N4C, self.share_NT, self.own_NA))
        self.edge_N4C, self.share_NT, self.own_NA = held
        self.near.add(vector_ND[:room])
        rows = [*range(begin, begin + room)]
        for at in range(room, count if self.capacity > self.fitted else room):
            rows.append(self.fitted + self.oldest)
            self.oldest = (self.oldest + 1) % (self.capacity - self.fitted)
            self.near.replace(rows[-1], vector_ND[at])
        kept = len(rows)
        self.edge_N4C[rows], self.share_NT[rows] = edge_N4C[:kept], share_NT[:kept]
        self.own_NA[rows] = vector_ND[:kept] @ self.learned["l.attend_DA"]

    def levels(self, row_S: np.ndarray, guess_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Level against which one more edge of these queries is held, and what the edge counts: of stored rows, and (-1) from a guess."""
        kappa, stored_S = self.kappa_2[0], row_S >= 0
        up_S, weight_S = self.gates(row_S)[:, :2, 0].astype(np.float64).T
        stored_S = stored_S & (weight_S > 0)
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
        """Edges of one model: in stored rows, or (-1) with the queries, which are stored with them."""
        column, stored_S = 1 + model, row_S >= 0
        edge_S4C = np.zeros((len(row_S), 4, self.edge_N4C.shape[2]), np.float32)
        edge_S4C[:, UP_E, column], edge_S4C[:, WEIGHT_E, column] = left_S * weight_S, weight_S
        old_S4C = edge_S4C[stored_S]
        self._absorb(vector_SD[stored_S], share_ST[stored_S], old_S4C, [column])
        self.edge_N4C[row_S[stored_S], :2, column] = old_S4C[:, :2, column]
        if not stored_S.all():
            self._store(vector_SD[~stored_S], share_ST[~stored_S], edge_S4C[~stored_S], [column])

    def spread_C(self) -> np.ndarray:
        """Standard deviation of what is left of an edge, of each column; that of all models where a model has few."""
        weight, square = self.square_2C[:, : self.columns]
        overall = square[1:].sum() / max(weight[1:].sum(), 1e-9)
        return np.sqrt((square + 10 * overall) / (weight + 10))

    # Predictions

    def look(self, vector_QD: np.ndarray, share_QT: np.ndarray, *, without: np.ndarray | None = None) -> Looked:
        """What profiles and neighbours say, queries in pieces.

        Args:
            vector_QD: unit vectors.
            share_QT: how much of each task they are.
            without: stored rows that the queries are, -1 for none: nothing of them is used.
        """
        pieces = [
            self._look(
                vector_QD[at : at + PIECE],
                share_QT[at : at + PIECE],
                None if without is None else without[at : at + PIECE],
            )
            for at in range(0, max(len(vector_QD), 1), PIECE)
        ]
        if len(pieces) == 1:
            return pieces[0]
        names = ("error_QC", "row_QJ", "alpha_QJ", "part_QF")
        joined = {name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names}
        return Looked(sum_2QC=np.concatenate([piece.sum_2QC for piece in pieces], 1), **joined)

    def _look(self, vector_QD: np.ndarray, share_QT: np.ndarray, without: np.ndarray | None) -> Looked:
        part_QF, columns = self.parts(vector_QD, share_QT), self.columns
        row_QJ, alpha_QJ = self._attention(vector_QD, without)
        sum_2QC = np.stack([part_QF @ profile_FC[:, :columns] for profile_FC in self.profile_2FC])
        spread_QC = part_QF @ self.spread_FC[:, :columns]
        if without is not None:
            self._take_out(part_QF, without, sum_2QC)
        edge_Q4C = np.einsum("qj,qjpc->qpc", alpha_QJ, self.edge_N4C[row_QJ, :, :columns]) if len(row_QJ) != 1 else (
            alpha_QJ @ self.edge_N4C[row_QJ[0]].reshape(row_QJ.shape[1], -1)
        ).reshape(1, 4, -1)[..., :columns]  # fmt: skip
        caution, weight = self.learned["l.caution_23"][:, 2], self.learned["l.weight_23"][:, 2]
        for head in range(2):
            sum_2QC[head] += weight[head] * edge_Q4C[:, 2 * head] / (edge_Q4C[:, 2 * head + 1] + caution[head])
        spread_QC = spread_QC + weight[0] ** 2 / (edge_Q4C[:, WEIGHT_E] + caution[0])
        return Looked(sum_2QC=sum_2QC, error_QC=np.sqrt(spread_QC), row_QJ=row_QJ, alpha_QJ=alpha_QJ, part_QF=part_QF)

    def _attention(self, vector_QD: np.ndarray, without: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        row_QJ, like_QJ = self.near.search(vector_QD, self.k + (without is not None))
        if without is not None and row_QJ.shape[1]:
            like_QJ = np.where(row_QJ == without[:, None], -np.inf, like_QJ)
            order_QJ = np.argsort(-like_QJ, 1, kind="stable")[:, : self.k]
            row_QJ, like_QJ = np.take_along_axis(row_QJ, order_QJ, 1), np.take_along_axis(like_QJ, order_QJ, 1)
        own_QA = vector_QD @ self.learned["l.attend_DA"]
        logit_QJ = like_QJ * self.learned["l.focus"] + (self.own_NA[row_QJ] @ own_QA[:, :, None])[..., 0]
        return row_QJ, np.exp(logit_QJ - logit_QJ.max(1, keepdims=True, initial=-1e9))

    def _take_out(self, part_QF: np.ndarray, without: np.ndarray, sum_2QC: np.ndarray) -> None:
        """Profiles as they would be without each query's own row."""
        for at in np.flatnonzero(without >= 0).tolist():
            row = int(without[at])
            edge_4C = self.edge_N4C[row, :, : self.columns].astype(np.float64)
            sum_2QC[:, at] = 0
            for bank in self.banks[::-1]:  # backwards: what the last bank left, then what the first did
                part_F = part_QF[at, bank].astype(np.float64)
                for head in range(2):
                    up_C, weight_C = edge_4C[2 * head], edge_4C[2 * head + 1]
                    up_C += weight_C * (part_F @ self.profile_2FC[head, bank, : self.columns])
                    up_FC, down_FC = self.sum_4FC[2 * head : 2 * head + 2, bank, : self.columns]
                    others_FC = down_FC - part_F[:, None] * weight_C + self.caution_2F1[head, bank]
                    sum_2QC[head, at] += part_F @ (
                        self.weight_2F1[head, bank] * (up_FC - part_F[:, None] * up_C) / others_FC
                    )

    def described(self, vector_QD: np.ndarray, model_MV: np.ndarray) -> np.ndarray:
        """The part of the effect that the description alone says, [Q, M]."""
        return (vector_QD @ self.learned["l.query_DA"]) @ (model_MV @ self.learned["l.describe_VA"]).T

    # Growing, saving

    def add_model(self, mean_2: np.ndarray) -> None:
        """A column more, without edges."""
        self.mean_2M = np.concatenate([self.mean_2M, mean_2[:, None]], 1)
        if self.columns > self.edge_N4C.shape[2]:
            room = ((0, 0), (0, 0), (0, self.columns))
            self.edge_N4C, self.sum_4FC, self.profile_2FC = (
                np.pad(held, room) for held in (self.edge_N4C, self.sum_4FC, self.profile_2FC)
            )
            self.square_2C, self.spread_FC = np.pad(self.square_2C, room[1:]), np.pad(self.spread_FC, room[1:])
        self.refresh()

    def state(self) -> tuple[Arrays, Facts]:
        """All of it."""
        arrays, facts = self.near.state()
        rows = len(self.near)
        own = {
            "mean_2M": self.mean_2M, "edge_N4C": self.edge_N4C[:rows], "share_NT": self.share_NT[:rows], "own_NA": self.own_NA[:rows],
            "sum_4FC": self.sum_4FC, "square_2C": self.square_2C,
        }  # fmt: skip
        names = {
            "kappa_2": list(self.kappa_2),
            "fitted": self.fitted,
            "oldest": self.oldest,
            "num_tasks": self.num_tasks,
        }
        return {**arrays, **self.learned, **{f"m.{name}": value.copy() for name, value in own.items()}}, {
            **facts,
            **names,
        }

    @classmethod
    def of_state(
        cls, arrays: Mapping[str, np.ndarray], facts: Facts, k: int, near: Neighbours, capacity: int
    ) -> "Memory":
        """From what `state` gave."""
        learned = {name: value for name, value in arrays.items() if name.startswith("l.")}
        first, second = facts["kappa_2"]
        made = cls(learned, arrays["m.mean_2M"], (first, second), k, near, facts["num_tasks"], capacity)
        near.load_state(dict(arrays), facts)
        for name in ("edge_N4C", "share_NT", "own_NA", "sum_4FC", "square_2C"):
            setattr(made, name, np.array(arrays[f"m.{name}"]))
        made.fitted, made.oldest = facts["fitted"], facts["oldest"]
        made.refresh()
        return made


def learned_arrays(network: "object") -> Arrays:
    """A trained `PlusNetwork`'s numbers as float32 arrays ``l.*``, exponents and softplus taken."""
    found = {f"l.{name}": value.detach().numpy().astype(np.float32) for name, value in network.named_parameters()}  # type: ignore[attr-defined]
    found["l.sharp_2"], found["l.focus"] = np.exp(found["l.sharp_2"]), np.exp(found["l.focus"])
    found["l.caution_23"] = np.logaddexp(0, found["l.caution_23"]).astype(np.float32)
    return found
