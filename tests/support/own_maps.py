"""An edit that takes nothing of anybody, by which the session's own computation is held to diffusers'."""

from fpe_pipeline import Edit, JointProduct

__all__ = ["OwnMaps"]


class OwnMaps(Edit):
    """Every row of joint attention its own map, computed by the session's processors."""

    def products(self, site, step, roles):
        return {row: JointProduct.own(row) for row in range(roles.rows)}
