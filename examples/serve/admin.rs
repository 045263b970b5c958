//! The listener for those who run the server: probes with details, and metrics.

use std::sync::Arc;

use axum::{
    Json, Router,
    http::{StatusCode, header::CONTENT_TYPE},
    middleware::from_fn_with_state,
    routing::get,
};
use metrics_exporter_prometheus::PrometheusHandle;

use super::{
    Health,
    browser::{Hosts, guard},
};

/// `/healthz`, `/readyz` with key ids and file names, and `/metrics` in the text format of Prometheus.
pub(crate) fn router(health: Arc<Health>, metrics: PrometheusHandle, hosts: Hosts) -> Router {
    let readyz = move || {
        let status = if health.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        std::future::ready((status, Json(health.details())))
    };
    let metrics = move || {
        metrics.run_upkeep();
        std::future::ready(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render()))
    };
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .layer(from_fn_with_state(hosts, guard))
}
