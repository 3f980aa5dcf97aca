"""Computations on a linear map that is only given by its products.

Each algorithm is a generator: it yields `base.Progress` between products and returns a
frozen result. None knows grpc, sessions or models; columns lead, ``[K, P]``.
"""
