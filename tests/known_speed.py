"""A deployment that is known to make so many tokens a second at most."""

from anabranch.gateway.dispatch.output_speed import HEADROOM, LESSONS, Lesson


def know(live, per_s, now, tier=""):
    for _ in range(LESSONS):
        live.speed.learn(tier, Lesson(per_s / HEADROOM), now)
