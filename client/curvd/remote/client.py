"""The blocking client: models, datasets and sessions on a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from curvd._calls import (
    Call,
    ObserveOpening,
    Progress,
    Tensors,
    session_requests,
    upload,
)
from curvd._transport import Connection
from curvd.config import ClientConfig, Pem, TlsConfig
from curvd.contract import (
    DatasetInfo,
    Dtype,
    InputStyle,
    LossSpec,
    Mode,
    ModelInfo,
    OperatorSpec,
    Output,
    ServerInfo,
    SessionInfo,
    Tier,
    element_type,
)
from curvd.errors import InvalidSpec
from curvd.exported import ExportedModel, prepare
from curvd.parameters import exportable
from curvd.remote.progress import ClientStages, opening, shown
from curvd.remote.session import Session

T = TypeVar("T")


def connect(
    target: str,
    *,
    config: ClientConfig | None = None,
    token: str | None = None,
    tls: TlsConfig | Pem | bool | None = None,
    deadline_s: float | None = None,
) -> Client:
    """Make a client. Nothing is sent before its first call.

    Args:
        target: ``host:port``, or ``unix:/path``.
        config: Everything; the other arguments override it.
        token: Sent with every call; needs TLS or a target on this machine.
        tls: True for the system's certificates, a file (or PEM) with the server's CA,
            or a `TlsConfig` for mutual TLS. False or None: plain text.
        deadline_s: Longest a call may take, its repetitions included.

    Returns:
        The client; close it, or use it in a ``with``.

    Examples:
        >>> with curvd.connect(target) as client:
        ...     client.healthy()
        True
    """
    return Client(target, configured(config, token, tls, deadline_s))


def checked(target: str) -> str:
    """Refuse what names no server.

    Args:
        target: As for `connect`.

    Returns:
        The same.

    Raises:
        InvalidSpec: If it is no string, or empty.
    """
    if not isinstance(target, str) or not target:
        msg = (
            "target names a server, 'host:port' or 'unix:/path', got "
            f"{target!r:.80}: is a variable of the environment not set?"
        )
        raise InvalidSpec(msg, target=target)
    return target


def configured(
    config: ClientConfig | None,
    token: str | None,
    tls: TlsConfig | Pem | bool | None,
    deadline_s: float | None,
) -> ClientConfig:
    """Read the arguments of `connect`.

    Args:
        config: Where to start from; None: the defaults.
        token: Overrides `config` unless it is None.
        tls: Likewise.
        deadline_s: Likewise.

    Returns:
        The configuration that they add up to.
    """
    changes: dict[str, Any] = {}
    if token is not None:
        changes["token"] = token
    if deadline_s is not None:
        changes["deadline_s"] = deadline_s
    if isinstance(tls, TlsConfig):
        changes["tls"] = tls
    elif isinstance(tls, bool):
        changes["tls"] = TlsConfig() if tls else None
    elif tls is not None:
        changes["tls"] = TlsConfig(ca=tls)
    return dataclasses.replace(config or ClientConfig(), **changes)


class Client:
    """A server's models, datasets and sessions. Threads may share it.

    Every call is repeated when the server is away for a moment, within the limits of
    `ClientConfig.retry`; every error is a `curvd.CurvdError`.

    Args:
        target: ``host:port``, or ``unix:/path``.
        config: How to reach it.

    Examples:
        >>> "mlp" in client.server_info().builders
        True
    """

    def __init__(self, target: str, config: ClientConfig) -> None:
        self._connection = Connection(checked(target), config)

    def register_model(
        self,
        model: str | ExportedModel,
        config: Mapping[str, Any] | None = None,
        state: Tensors | None = None,
        *,
        share_with: Sequence[str] = (),
        progress: Progress | bool = False,
    ) -> ModelInfo:
        """Register an architecture with its state. Same content, same model.

        What the server has already is not sent again, and an upload that breaks goes
        on where it was.

        Args:
            model: Any module as `curvd.export` writes it, or the name of one of
                `ServerInfo.builders`.
            config: The builder's options, JSON values only.
            state: Every entry of the module's state: ``module.state_dict()``, NumPy
                arrays by name, or the path of a safetensors file; None: what was
                exported. bfloat16 tensors travel as float32, unless they come in a
                file.
            share_with: Other callers who may use it: names, and groups behind an "@".
                Given for what is registered, they take the place of those before.
            progress: Called with bytes done and in total; True draws a bar on stderr.

        Returns:
            The model.

        Examples:
            >>> state = {"1.weight": np.eye(3, 8), "1.bias": np.zeros(3)}
            >>> model = client.register_model("mlp", {"widths": [8, 3]}, state)
            >>> [(tensor.name, tensor.shape) for tensor in model.tensors]
            [('1.weight', (3, 8)), ('1.bias', (3,))]
            >>> client.register_model("mlp", {"widths": [8, 3]}, state).id == model.id
            True
        """
        with shown(progress, "model") as callback:
            call = upload.register_model(model, config, state, callback, share_with)
            return self._connection.run(call)

    def register_dataset(
        self,
        tensors: Tensors | Iterable[Any] | None = None,
        *,
        name: str | None = None,
        digest: str | None = None,
        inputs: Sequence[str] | str,
        target: str,
        batch_size: int,
        input_style: InputStyle | str = InputStyle.POSITIONAL,
        share_with: Sequence[str] = (),
        progress: Progress | bool = False,
    ) -> DatasetInfo:
        """Register named tensors as fixed mini-batches. Same content, same dataset.

        Args:
            tensors: Inputs and target by name, [N, ...] each; the path of a safetensors
                file; or a pair, a DataLoader, a Dataset or an iterable of mini-batches,
                whose entries are the inputs in order and the target after them.
            name: One of `ServerInfo.datasets`, in place of tensors: a file that lies on
                the server, and may have more tensors than are used here.
            digest: SHA-256 of a safetensors file that the server has, because it was
                uploaded or used by name before, in place of tensors.
            inputs: Names of the model's inputs, in order.
            target: Name of the target.
            batch_size: ``B``; the last mini-batch may be smaller.
            input_style: How the model wants its inputs.
            share_with: Other callers who may use it, as for `register_model`.
            progress: Called with bytes done and in total; True draws a bar on stderr.

        Returns:
            The dataset.

        Examples:
            >>> data = {"x": np.ones((10, 8)), "y": np.zeros(10, dtype=int)}
            >>> dataset = client.register_dataset(data, inputs=["x"], target="y", batch_size=4)
            >>> dataset.data_points, dataset.total_bytes
            (10, 848)
        """
        with shown(progress, "dataset") as callback:
            call = upload.register_dataset(
                tensors,
                name=name,
                digest=digest,
                inputs=inputs,
                target=target,
                batch_size=batch_size,
                input_style=input_style,
                progress=callback,
                share_with=share_with,
            )
            return self._connection.run(call)

    def create_session(
        self,
        model: ModelInfo | str,
        dataset: DatasetInfo | str,
        *,
        loss: LossSpec | Mapping[str, Any] | str,
        weight_decay: float | Mapping[str, float] | None = None,
        dtype: Any = Dtype.FLOAT32,
        mode: Mode | str = Mode.EVAL,
        operators: Sequence[OperatorSpec | str] | None = (),
        params: Sequence[str] | str = (),
        budget_bytes: int | None = None,
        lease_s: float | None = None,
        name: str = "",
        validate_only: bool = False,
        plan: Tier | str | None = None,
        share_with: Sequence[str] = (),
        progress: ObserveOpening | bool = False,
    ) -> Session:
        """Bring a model, a dataset and a loss together, verified and warm.

        Args:
            model: The model, from `register_model`, or its id.
            dataset: The dataset, from `register_dataset`, or its id.
            loss: A name, a `LossSpec`, or its keywords as a dict.
            weight_decay: Adds ``weight_decay / 2 * |p|^2`` over all parameters to the
                objective; a dict has one for each glob over names, and the first that
                matches a parameter counts. None: the loss's own.
            dtype: What to compute in: ``"F32"``, ``np.float64``, ``torch.bfloat16``, …
            mode: Whether layers evaluate or use the statistics of the mini-batches.
            operators: What to build before the answer; empty: the Hessian. None: nothing;
                each operator is built, and verified, when it is first used.
            params: Globs over parameter names, such as ``["blocks.*.attn.*", "head.*"]``:
                operators act on those that match, in this order; the others are
                constants. Empty: all.
            budget_bytes: Memory for kept linearisations; None: the server's default.
            lease_s: Delete the session after so long without a call; None: as the server
                is set, by default a week.
            name: A label for people.
            validate_only: Check and predict only: `Session.info` has the plans, and
                its id is empty.
            plan: Which tier the first answer of an operator waits for. ``first``: the
                quickest to build; a faster one takes over later, which rounds
                differently, and results say which one computed them. ``final``: the last
                one, and nothing takes over, so equal requests have equal bits
                throughout. None: as the server is set, by default ``first``.
            share_with: Other callers who may use it: names, and groups behind an "@".
                They multiply, query, and store vectors of their own; parameters and
                the end of the session are its owner's.
            progress: Called with a `StageProgress` on the way; True draws a line on a
                terminal.

        Returns:
            The session.

        Examples:
            >>> session = client.create_session(
            ...     model, dataset, loss="cross_entropy", dtype="F64", params=["3.*"]
            ... )
            >>> session.layout.names, session.layout.size
            (('3.weight', '3.bias'), 18)
            >>> (session.hessian() @ np.ones(18)).shape
            (18,)
        """
        call = session_requests.create_session(
            model,
            dataset,
            loss=loss,
            weight_decay=weight_decay,
            dtype=dtype,
            mode=mode,
            operators=operators,
            params=params,
            budget_bytes=budget_bytes,
            lease_s=lease_s,
            name=name,
            validate_only=validate_only,
            plan=plan,
            share_with=share_with,
        )
        with opening(progress) as observe:
            info = self._connection.run(call.observed(observe))
        spec = dataset.spec if isinstance(dataset, DatasetInfo) else None
        return Session(self._connection, info, spec)

    def session_for(
        self,
        module: Any,
        loss: Any,
        data: Any,
        *,
        batch_size: int | None = None,
        output: Output = None,
        dtype: Any = None,
        mode: Mode | str | None = None,
        check: bool = True,
        progress: ObserveOpening | bool = False,
        checkpoint: str | None = None,
        **options: Any,
    ) -> Session:
        """Bring a module, a loss and data into a session, in one call.

        The module and, unless it is one of torch's common ones, the loss are exported
        as graphs; what the server has already is not sent again. The session computes
        in the module's own type unless `dtype` names another.

        Args:
            module: Any ``nn.Module`` that `curvd.export` takes.
            loss: A loss module or function of torch, a `functools.partial` of one, a
                function of outputs and targets that is a mean or sum over data points
                (or returns a sum and its weight), or what `create_session` takes. None:
                the loss that the module itself returns as ``loss`` when it is called
                with ``labels=``, as those of transformers do.
            data: A pair of inputs (an array, a tuple of arguments, or a mapping of keyword
                arguments) and targets, each with the leading axis N; or one mapping with
                ``labels``, such as a tokenizer's batch; or a Dataset, a DataLoader or an
                iterable of mini-batches, which are read to their end once. Arrays are
                torch's, NumPy's or lists of numbers.
            batch_size: ``B``; the last mini-batch may be smaller. None: that of the
                loader or of the first mini-batch.
            output: Which of the module's results the loss takes, by name or index. A
                list of them: the loss takes a tuple; ``...``: all that the module
                returns, as it returns it. None: see `curvd.export`.
            dtype: What to compute in; None: the module's type. A module whose parameters
                have several types, or one that no session has, such as float16, needs it:
                the session computes the module's function of the same parameters in it.
            mode: Whose statistics BatchNorm uses; see `curvd.export`.
            check: Whether to prove that what is exported has the module's and the
                loss's values and gradients; see `curvd.export`.
            progress: Called with a `StageProgress` on the way; True draws a line on a
                terminal.
            checkpoint: Whose parameters the session begins with, in place of the
                module's; see `Session.update_parameters`.
            **options: As for `create_session`; ``operators`` is None unless it is given.

        Returns:
            The session.

        Examples:
            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LogSoftmax(1))
            >>> data = torch.randn(20, 4), torch.randint(3, (20,))
            >>> session = client.session_for(net, torch.nn.NLLLoss(), data, batch_size=10)
            >>> session.info.loss.name, session.layout.names
            (<LossName.NLL: 'nll'>, ('0.weight', '0.bias'))
            >>> (session.fisher() @ torch.ones(15)).shape
            torch.Size([15])
        """
        with opening(progress) as observe:
            stages = ClientStages(observe)
            stages.exporting()
            ready = prepare(
                exportable(module),
                loss,
                data,
                output,
                mode,
                batch_size=batch_size,
                dtype=None if dtype is None else element_type(dtype),
                check=check,
            )
            dataset = self.register_dataset(
                ready.data,
                inputs=ready.model.inputs,
                target=ready.target,
                batch_size=ready.batch_size,
                progress=stages.registering("dataset"),
            )
            model = self.register_model(
                ready.model, progress=stages.registering("model")
            )
            session = self.create_session(
                model,
                dataset,
                loss=ready.loss,
                dtype=ready.dtype,
                mode=ready.model.mode,
                progress=observe or False,
                **{"operators": None, **options},
            )
        session._origin = ready.origin
        if checkpoint is not None:
            try:
                session.update_parameters(checkpoint=checkpoint)
            except BaseException:
                session.delete()
                raise
        return session

    def session(self, session_id: str) -> Session:
        """Find a session that exists.

        Args:
            session_id: Its id.

        Returns:
            The session.

        Examples:
            >>> same = client.session(session.id)
            >>> same.info.version == session.info.version
            True
        """
        call = session_requests.get_session(session_id)
        return Session(self._connection, self._connection.run(call))

    def sessions(self) -> list[SessionInfo]:
        """List the sessions, oldest first.

        Examples:
            >>> session.id in [info.id for info in client.sessions()]
            True
        """
        return self._all(session_requests.list_sessions)

    def models(self) -> list[ModelInfo]:
        """List the models on the server, oldest first.

        Returns:
            Those that are the caller's and those shared with him; each says its size,
            when it was registered, and which sessions need it.

        Examples:
            >>> (mine,) = [info for info in client.models() if info.id == model.id]
            >>> mine.state_bytes == model.state_bytes, session.id in mine.session_ids
            (True, True)
        """
        return self._all(session_requests.list_models)

    def datasets(self) -> list[DatasetInfo]:
        """List the datasets on the server, oldest first.

        Returns:
            As for `models`.

        Examples:
            >>> dataset.id in [info.id for info in client.datasets()]
            True
        """
        return self._all(session_requests.list_datasets)

    def _all(self, page: Callable[[str], Call[session_requests.Page[T]]]) -> list[T]:
        """Ask for page after page."""
        found, token = self._connection.run(page(""))
        while token:
            more, token = self._connection.run(page(token))
            found += more
        return found

    def delete_model(self, model: ModelInfo | str) -> None:
        """Delete a model that no session needs any more.

        Args:
            model: The model, or its id.

        Examples:
            >>> state = {"1.weight": np.eye(2, 8), "1.bias": np.zeros(2)}
            >>> small = client.register_model("mlp", {"widths": [8, 2]}, state)
            >>> client.delete_model(small)
            >>> client.delete_model(small)
            Traceback (most recent call last):
            curvd.errors.ModelNotFound: ...
        """
        self._connection.run(session_requests.delete_model(model))

    def delete_dataset(self, dataset: DatasetInfo | str) -> None:
        """Delete a dataset that no session needs any more.

        Args:
            dataset: The dataset, or its id.

        Examples:
            >>> data = {"x": np.ones((6, 8)), "y": np.zeros(6, dtype=int)}
            >>> few = client.register_dataset(data, inputs="x", target="y", batch_size=6)
            >>> client.delete_dataset(few)
        """
        self._connection.run(session_requests.delete_dataset(dataset))

    def server_info(self) -> ServerInfo:
        """Describe the server: versions, limits, devices, builders, capabilities.

        Examples:
            >>> client.server_info().limits.columns
            1048576
        """
        return self._connection.run(session_requests.server_info())

    def healthy(self) -> bool:
        """Tell whether the server is serving; False while it drains."""
        return self._connection.run(session_requests.healthy())

    def close(self) -> None:
        """Close the connection; sessions stay on the server."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._connection.target}>"
