//! Serves the metrics as Prometheus text at `/metrics`. Off unless `--metrics-listen` is given.

use std::net::SocketAddr;

use afferent_engine::metrics::Metrics;
use axum::Router;
use axum::http::header;
use axum::routing::get;
use tokio::net::TcpListener;

/// Binds and serves until the process ends.
///
/// # Errors
/// When the address cannot be bound.
pub async fn start(address: SocketAddr, metrics: Metrics) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await.map_err(|e| anyhow::anyhow!("listening for metrics on {address}: {e}"))?;
    let bound = listener.local_addr()?;
    let app = Router::new().route(
        "/metrics",
        get(move || async move { ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render()) }),
    );
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::error!(%error, "the metrics listener ended");
        }
    });
    Ok(bound)
}
