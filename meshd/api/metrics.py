"""`/metrics`: Prometheus text from plain counts, made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

from meshd.ids import ModelId
from meshd.view import ModelState, PeerState

if TYPE_CHECKING:
    from prometheus_client import Metric

    from meshd.api.relay import Relay
    from meshd.view import View

Sample: TypeAlias = tuple[str, Mapping[str, str], float]
"""(name, labels, value). A name that ends in `_total` is a counter, any other a gauge."""
MetricSource: TypeAlias = Callable[[], Iterable[Sample]]
"""Other rooms' numbers, read at every scrape."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(view: View, relay: Relay, source: MetricSource | None) -> bytes:
    # Imported here: the library takes a tenth of the time to the first listening socket, and a
    # node that is never scraped does not need it.
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Snapshot(Collector):
        def collect(self) -> Iterable[Metric]:
            yield from _traffic(relay)
            yield from _state(view, relay)
            yield from _peers(view)
            if source is not None:
                yield from _foreign(source())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Snapshot())
    return generate_latest(registry)


def _traffic(relay: Relay) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

    traffic = relay.traffic
    requests = CounterMetricFamily(
        "meshd_requests", "Requests by how they ended.", labels=["model", "route", "outcome"]
    )
    seconds = HistogramMetricFamily(
        "meshd_request_seconds", "From a request to the end.", labels=["model", "route"]
    )
    ttft = HistogramMetricFamily(
        "meshd_ttft_seconds", "From a granted slot to the first byte.", labels=["model", "route"]
    )
    for (model, route), row in traffic.by_model.items():
        for outcome, count in row.outcomes.items():
            requests.add_metric([model, route, outcome], count)
        seconds.add_metric([model, route], row.seconds.cumulative(), row.seconds.total)
        ttft.add_metric([model, route], row.ttft.cumulative(), row.ttft.total)
    relayed = CounterMetricFamily(
        "meshd_relay_bytes",
        "Bytes to (in) and from (out) engines, here or elsewhere.",
        labels=["direction"],
    )
    relayed.add_metric(["in"], traffic.bytes_in)
    relayed.add_metric(["out"], traffic.bytes_out)
    retries = CounterMetricFamily("meshd_retries", "Attempts made again.", labels=["reason"])
    for reason, count in traffic.retries.items():
        retries.add_metric([reason], count)
    yield from (requests, seconds, ttft, relayed, retries)


def _state(view: View, relay: Relay) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    inflight = GaugeMetricFamily("meshd_inflight", "Slots in use.", labels=["model"])
    queue = GaugeMetricFamily("meshd_queue_depth", "Requests that wait.", labels=["model"])
    state = GaugeMetricFamily(
        "meshd_model_state", "1 for the state the model is in.", labels=["model", "state"]
    )
    for model_id, model in view.models.items():
        inflight.add_metric([model_id], relay.slots_in_use(ModelId(model_id)))
        queue.add_metric([model_id], relay.queue_depth(ModelId(model_id)))
        for one in ModelState:
            state.add_metric([model_id, one.value], float(one is model.state))
    lag = GaugeMetricFamily(
        "meshd_event_loop_lag_seconds", "Worst lag of the event loop in the last ten seconds."
    )
    lag.add_metric([], max(relay.traffic.lags))
    yield from (inflight, queue, state, lag)
    if view.cache is not None:
        cache = GaugeMetricFamily("meshd_cache_bytes", "Model weights on disk.")
        cache.add_metric([], view.cache.used_bytes)
        yield cache


def _peers(view: View) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    peers = GaugeMetricFamily("meshd_peers", "Other nodes by state.", labels=["state"])
    for state in PeerState:
        peers.add_metric([state.value], sum(peer.state is state for peer in view.peers))
    rtt = GaugeMetricFamily(
        "meshd_peer_rtt_seconds", "Smoothed round trip of a control message.", labels=["peer"]
    )
    for peer in view.peers:
        if peer.rtt_s is not None and peer.state in (PeerState.ALIVE, PeerState.SUSPECT):
            rtt.add_metric([peer.name], peer.rtt_s)
    yield from (peers, rtt)


def _foreign(samples: Iterable[Sample]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for name, labels, value in samples:
        family = families.get(name)
        if family is None:
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            words = name.removeprefix("meshd_").removesuffix("_total").replace("_", " ")
            family = families[name] = kind(
                name.removesuffix("_total"), f"{words.capitalize()}.", labels=list(labels)
            )
        family.add_metric(list(labels.values()), value)
    yield from families.values()
