"""How property tests run: as many examples as a test names, the same ones every time, and no clock."""

from hypothesis import HealthCheck, Phase, settings


def tried(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
