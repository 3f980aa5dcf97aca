"""Parameters of several types: exported where that is one function, else refused as such."""

import pytest
import torch
from torch import nn

import curvd

X = torch.linspace(-1, 1, 32).reshape(8, 4)


class Headed(nn.Module):
    """A body and a head, each in a type of its own."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5).to(body), nn.Linear(5, 2).to(head)

    def forward(self, x):
        h = torch.tanh(self.body(x.to(torch.bfloat16)))
        return self.head(h.float())


@pytest.mark.parametrize("prepared", [True, False])
def test_a_body_in_half_precision_and_a_whole_head_are_refused_as_such(prepared):
    module = Headed(torch.bfloat16, torch.float32).eval()
    with pytest.raises(
        curvd.CurvdError,
        match=r"several types \(bfloat16 as body\.w.*module\.float\(\)",
    ):
        if prepared:
            data = X, X[:, :2]
            curvd.exported.prepare(
                module, nn.MSELoss(), data, None, None, batch_size=4, check=True
            )
        else:
            curvd.export(module, X)


def test_other_refusals_of_modules_of_one_type_stay_what_they_are():
    module = nn.Linear(5, 2)
    with pytest.raises(curvd.CurvdError) as refusal:
        curvd.export(module, X)
    assert "several types" not in str(refusal.value)
