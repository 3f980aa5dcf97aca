"""The type-1 Fisher: targets sampled from the model's own distribution.

It describes that distribution, in which weight decay has no part.
"""

from __future__ import annotations

from curvd_server.engine.objective import check_samples, sampled_loss_hessian
from curvd_server.engine.operators.jacobian_form import JacobianForm
from curvd_server.engine.operators.protocol import Definition

DEFINITION: Definition = JacobianForm(
    metric=sampled_loss_hessian, adds_weight_decay=False, check_loss=check_samples
)
