//! What the server counts, in the format of Prometheus.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::http::Method;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::engine::Engine;
use crate::model::SandboxStatus;

/// Upper bounds of the durations' classes, seconds: an answer from memory, a command in a warm sandbox, a cold start.
const BOUNDS: [f64; 12] = [0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 5.0, 30.0, 300.0];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Request {
    method: &'static str,
    route: String,
    status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Route {
    route: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct InStatus {
    status: Status,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelValue)]
#[allow(non_camel_case_types)]
enum Status {
    running,
    paused,
    stopped,
}

/// The counters. Their labels are routes, not paths, and methods that there are: clients cannot make new ones.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<Request, Counter>,
    durations: Family<Route, Histogram>,
    in_flight: Gauge,
    refused: Counter,
    sandboxes: Family<InStatus, Gauge>,
    runs: Gauge,
    uptime: Gauge<f64, AtomicU64>,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let mut registry = Registry::with_prefix("agentkernel");
        let metrics = Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(BOUNDS)),
            in_flight: Gauge::default(),
            refused: Counter::default(),
            sandboxes: Family::default(),
            runs: Gauge::default(),
            uptime: Gauge::default(),
            registry: Registry::default(),
        };
        registry.register("http_requests", "Requests that were answered", metrics.requests.clone());
        registry.register(
            "http_request_duration_seconds",
            "Time to the head of the answer",
            metrics.durations.clone(),
        );
        registry.register("http_requests_in_flight", "Requests without an answer", metrics.in_flight.clone());
        registry.register(
            "http_refused",
            "Requests without the right to be answered",
            metrics.refused.clone(),
        );
        registry.register("sandboxes", "Sandboxes", metrics.sandboxes.clone());
        registry.register(
            "runs",
            "Commands in temporary sandboxes, running or waiting",
            metrics.runs.clone(),
        );
        registry.register("uptime_seconds", "Time since the start", metrics.uptime.clone());
        Self { registry, ..metrics }
    }

    /// Counts a request until what is returned is dropped.
    pub(super) fn begin(&self) -> InFlight {
        self.in_flight.inc();
        InFlight(self.in_flight.clone())
    }

    pub(super) fn refused(&self) {
        self.refused.inc();
    }

    pub(super) fn answered(&self, method: &Method, route: &str, status: u16, time: Duration) {
        let (method, route) = (known(method), route.to_owned());
        self.durations.get_or_create(&Route { route: route.clone() }).observe(time.as_secs_f64());
        self.requests.get_or_create(&Request { method, route, status }).inc();
    }

    /// All of them, as text.
    pub(super) async fn text(&self, engine: &Engine) -> String {
        let all = engine.list().await.unwrap_or_default();
        for (status, label) in [
            (SandboxStatus::Running, Status::running),
            (SandboxStatus::Paused, Status::paused),
            (SandboxStatus::Stopped, Status::stopped),
        ] {
            let count = all.iter().filter(|sandbox| sandbox.status == status).count();
            let gauge = self.sandboxes.get_or_create(&InStatus { status: label });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.runs.set(i64::try_from(engine.admitted()).unwrap_or(i64::MAX));
        self.uptime.set(engine.uptime().as_secs_f64());
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// A method's name: HTTP lets clients think of others.
fn known(method: &Method) -> &'static str {
    const KNOWN: [&str; 8] = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"];
    KNOWN.into_iter().find(|known| *known == method.as_str()).unwrap_or("other")
}

/// A request without an answer.
pub(super) struct InFlight(Gauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_make_no_labels() {
        let metrics = Metrics::new();
        for number in 0..100 {
            let method = Method::from_bytes(format!("M{number}").as_bytes()).unwrap();
            metrics.answered(&method, "/run", 405, Duration::ZERO);
        }
        metrics.answered(&Method::GET, "/run", 405, Duration::ZERO);
        let mut text = String::new();
        encode(&mut text, &metrics.registry).unwrap();
        let lines: Vec<_> =
            text.lines().filter(|line| line.starts_with("agentkernel_http_requests_total{")).collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(
            lines.iter().any(|line| line.contains("method=\"other\"") && line.ends_with(" 100")),
            "{lines:?}"
        );
    }
}
