"""One run of `lectern render`: its folders, log, progress and results, and the threads that walk the road."""

from __future__ import annotations

import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from model.files import CheckpointError, fingerprint
from ray_jobs.backend import Backend, Failed, LocalBackend, RayBackend, Resources
from ray_jobs.delivery import Deliveries
from ray_jobs.environment import versions
from ray_jobs.events import EventLog
from ray_jobs.exit_codes import ALL_DELIVERED, INTERRUPTED, NOT_ALL_DELIVERED, NOTHING_STARTED
from ray_jobs.failures import failure_class
from ray_jobs.folder import Folder, FolderError, join
from ray_jobs.loading import CannotStart, watch_loading
from ray_jobs.orders import Order
from ray_jobs.plan import Plan, Refused, Request, default_store, make_plan, show_problems, show_settings
from ray_jobs.pool import Pool, Stopped, cpus_needed, pool_sizes
from ray_jobs.progress import Reporter, Summary, console
from ray_jobs.results import Result, begin, earlier, show, write
from ray_jobs.road import Road
from ray_jobs.settings import resolve
from ray_jobs.store import Store
from ray_jobs.workers import check_weights
from stages.types import Measured, as_dict

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Walk = Callable[[Road, Order], Measured]


class Run:
    """Opens the output folder and the store, logs every change of state, and tells the user.

    Raises Refused where the settings, the folders or the manifest do not allow even a start.
    """

    def __init__(self, request: Request) -> None:
        assert request.out is not None
        self.request = request
        self.console = console(stderr=True)
        self.effective = resolve(request.layers)
        self.results: dict[int, Result] = {}
        self._others: list[Result] = []
        self._backend: Backend | None = None
        self._interrupted = False
        self._road: Road | None = None
        self._started = time.monotonic()
        _require_writable("--out", default_store(request.out) if request.out else "")
        if request.store is not None:
            _require_writable("--store", request.store)
        self.out = Folder(request.out)
        self.home = Store(default_store(request.out))
        self.store = Store(request.store) if request.store else self.home
        self._name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        self._events = EventLog(self.out, self._name)
        self._summary = Summary()
        self._events.listen(self._summary.feed)
        self._events.emit("run_started", manifest=request.manifest)

    def __enter__(self) -> Run:
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._catch_signals()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._interrupted and isinstance(error, KeyboardInterrupt):
            self.finish()
        elif error is not None:
            self._events.emit("run_ended", exit_code=NOTHING_STARTED, reason=str(error))
        self._events.close()
        if self._backend is not None:
            self._backend.stop()

    def _catch_signals(self) -> None:
        """SIGINT and SIGTERM end the run in order, a second one ends the process.

        Lessons that are on the road are stopped; before, KeyboardInterrupt ends what is being checked.
        """

        def handle(number: int, _: object) -> None:
            signal.signal(number, signal.SIG_DFL)
            self._interrupted = True
            if self._road is None:
                raise KeyboardInterrupt
            self._road.stop()

        for number in _SIGNALS:
            signal.signal(number, handle)

    # ---------------------------------------------------------------- before the road

    def check(self) -> Plan:
        """Check every row that was asked for and show all problems together."""
        show_settings(self.effective, self.console)
        try:
            weights = fingerprint(self.effective.settings)
        except CheckpointError as error:
            raise Refused(str(error)) from error
        plan = make_plan(self.request, self.effective, weights, self.store, self._start_backend)
        show_problems(plan.problems, self.console)
        if self.request.strict and plan.problems:
            raise Refused(f"--strict: {len(plan.problems)} problems, so nothing was rendered")
        self.results, self._others = begin(plan), earlier(self.out, plan.others)
        self._events.emit("checked", lessons=len(plan.rows), problems=len(plan.problems))
        self.home.put_run(self._name, "settings", as_dict(self.effective))
        self.home.put_run(self._name, "versions", versions())
        segments = {lesson.lesson_id: [s.id for s in prepared.segments] for lesson, prepared in plan.ready}
        self.home.put_run(self._name, "identities", segments)
        return plan

    def not_delivered(self, plan: Plan) -> list[Order]:
        """Lessons that are still to be made, longest first: a lesson's segments are rendered one by one."""
        self._deliveries = Deliveries(self.out, self.home)
        orders = []
        for lesson, prepared in plan.ready:
            order = Order(lesson, prepared, self.results[lesson.number])
            measured = self._deliveries.find(order)
            if measured is None:
                orders.append(order)
            else:
                order.result.take(measured, "reused", join(self.out.name, order.output))
        for result in self.results.values():
            if result.status != "not_started":
                self._ended(result)
        self._events.emit(
            "work_planned",
            segments=sum(plan.missing_segments(order.prepared) for order in orders),
            frames=sum(plan.missing_frames(order.prepared) for order in orders),
        )
        return sorted(orders, key=lambda order: -plan.missing_frames(order.prepared))

    def _start_backend(self) -> Backend:
        """Ray, or this process; started when it is first needed, since a run may find everything done."""
        if self._backend is None and self.request.local:
            self._backend = LocalBackend()
        elif self._backend is None:
            began = time.monotonic()
            try:
                self._backend = RayBackend(self.request.address, cpus_needed(self.effective.settings))
            except (OSError, RuntimeError, ValueError) as error:
                raise Refused(f"--address {self.request.address}: Ray cannot be used: {error}") from error
            seconds = round(time.monotonic() - began, 1)
            self._catch_signals()  # Ray has set its own
            self._events.emit("ray_started", seconds=seconds)
            self.console.print(f"Ray started in {seconds} s", highlight=False)
        assert self._backend is not None
        return self._backend

    # ---------------------------------------------------------------- on the road

    @contextmanager
    def open_road(self, orders: list[Order]) -> Iterator[Road]:
        """Workers for the lessons that are left, and progress while they are used.

        Raises Refused if a stage's workers find no place or cannot load their model.
        """
        settings = self.effective.settings
        backend = self._start_backend()
        self._check_weights(backend)
        sizes = pool_sizes(settings, len(orders))
        road = Road(backend, settings, sizes, self.store, self.out.uri, self._events, self._summary, orders)
        reporter = Reporter(self._summary, settings.progress_seconds, self.console)
        reporter.start()
        self._road = road
        try:
            yield road
        finally:
            reporter.stop()
            road.close()

    def _check_weights(self, backend: Backend) -> None:
        """Compare the checkpoint's headers with what the models need, on a CPU, before anything is loaded."""
        settings = self.effective.settings
        task = Resources(settings.prepare_cpus, custom=settings.cpu_resource)
        try:
            backend.get(backend.task(check_weights, settings, resources=task))
        except Failed as failure:
            raise Refused(str(failure.cause)) from failure

    def each(self, orders: list[Order], road: Road, walk: Walk) -> None:
        """Walk every lesson down the road, as many at once as the pools can use."""
        at_once = 1 if self.request.local else road.sizes.lessons
        with ThreadPoolExecutor(2, "loading") as loaders, ThreadPoolExecutor(at_once, "lesson") as lessons:
            pools = {"transformer": road.groups, "decoder": road.decoders}
            loading = [loaders.submit(self._load, road, stage, pool) for stage, pool in pools.items()]
            walking = [lessons.submit(self._walk, walk, road, order) for order in orders]
            for future in walking:
                future.result()
            for pool in pools.values():
                pool.stop()
            for future in loading:
                future.result()

    def _load(self, road: Road, stage: str, pool: Pool) -> None:
        try:
            timeout = self.effective.settings.placement_timeout
            watch_loading(road.backend, stage, pool, self._events, timeout)
        except CannotStart as error:
            road.stop()
            raise Refused(str(error)) from error

    def _walk(self, walk: Walk, road: Road, order: Order) -> None:
        """One lesson, with whatever happens to it as its result: it never costs another lesson."""
        if road.closing.is_set():
            return
        result = order.result
        self._events.emit("lesson_started", lesson=result.lesson_id, row=result.row)
        began = time.monotonic()
        try:
            measured = walk(road, order)
            self._deliveries.record(order, measured)
            result.take(measured, "done", join(self.out.name, order.output))
        except Stopped:
            result.status = "stopped"
        except Exception as error:
            cause = error.cause if isinstance(error, Failed) else error
            result.fail("failed", failure_class(cause), f"{type(cause).__name__}: {cause}")
        finally:
            road.release(order)
        result.seconds = round(time.monotonic() - began, 2)
        self._ended(result)
        limit = self.request.max_failures
        if limit is not None and sum(r.status == "failed" for r in self.results.values()) >= limit:
            road.closing.set()

    # ---------------------------------------------------------------- the end

    def finish(self) -> int:
        """Write the results, show them, and return the exit code."""
        results = list(self.results.values())
        write(self.out, [*results, *self._others])
        show(results, time.monotonic() - self._started, self.console)
        if self._interrupted:
            code = INTERRUPTED
        else:
            code = ALL_DELIVERED if all(result.delivered for result in results) else NOT_ALL_DELIVERED
        counts = Counter(result.status for result in results)
        self._events.emit("run_ended", exit_code=code, counts=dict(counts))
        return code

    def _ended(self, result: Result) -> None:
        self._events.emit(
            "lesson_ended",
            lesson=result.lesson_id,
            row=result.row,
            status=result.status,
            failure=result.failure,
            reason=result.reason,
        )


def _require_writable(flag: str, uri: str) -> None:
    """Raises Refused if no file can be written to a folder."""
    try:
        Folder(uri).probe()
    except (FolderError, ValueError, OSError) as error:
        raise Refused(f"{flag}: {error}") from error
