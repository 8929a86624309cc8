"""The right to erasure, in IC-Cache: of a tenant, a user, one decision, or everybody."""

from collections import deque
from collections.abc import Iterable

from anabranch.routers.ic_cache.core import Core


class Erasing(Core):
    """See the module."""

    def forget(self, *, tenant: str = "", user: str | None = None, ids: Iterable[int] | None = None) -> int:
        """The right to erasure: a tenant's examples (all, or a user's, or these ids) leave the pool, its index, prompts that hold them,
        decisions that wait for feedback, what proxy and critic learn from, and the log. Returns how many examples went.
        """
        gone = self.pool.forget(tenant=tenant, user=user, ids=ids)

        def is_theirs(whose_tenant: str, whose_user: str) -> bool:
            return ids is None and whose_tenant == tenant and user in (None, whose_user)

        for id in [id for id, routed in self._pending.items() if is_theirs(routed.query.tenant, routed.query.user)]:
            del self._pending[id]
        self.log.forget(lambda row: is_theirs(row["tenant"], row["user"]))
        kept = [
            lesson
            for lesson in self._lessons
            if not is_theirs(lesson.tenant, lesson.user) and gone.isdisjoint(lesson.ids)
        ]
        self._lessons = deque(kept, maxlen=self._lessons.maxlen)
        if ids is None:
            self.router.critic.buffer.forget(tenant, user)
        self.metrics.count("ic_cache_removed_total", len(gone), reason="erased")
        return len(gone)

    def forget_decision(self, id: str) -> int:
        """Erase one decision: the example that its answer became, and all that is remembered of it. Returns how many examples went."""
        routed = self._pending.pop(id, None)
        found = [example for example in self.pool if example.source == id]
        count = sum(self.forget(tenant=example.tenant, ids=[example.id]) for example in found)
        self.log.forget(lambda row: bool(row["id"] == id))
        if routed is not None and routed.x_I is not None:
            self.router.critic.buffer.forget_context(routed.x_I)
        return count

    def forget_all(self) -> int:
        """Erase what is remembered of everybody. Returns how many examples went."""
        owners = {example.tenant for example in self.pool} | {routed.query.tenant for routed in self._pending.values()}
        owners |= {lesson.tenant for lesson in self._lessons} | {row["tenant"] for row in self.log.rows}
        owners |= {tenant for tenant, _ in self.router.critic.buffer.owner_N}
        return sum(self.forget(tenant=tenant) for tenant in sorted(owners))
