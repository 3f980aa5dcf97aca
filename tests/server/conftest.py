import pytest


@pytest.fixture(autouse=True, scope="session")
def twice_differentiable_attention():
    """What the server does at start-up."""
    torch = pytest.importorskip("torch")
    from curvd_server.rewrites import use_differentiable_attention

    use_differentiable_attention()
    torch.set_num_threads(1)
