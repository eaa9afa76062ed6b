//! The operator's socket: HTTP/1.1 on a Unix socket that only the daemon's own user can open.
//!
//! `POST /accounts` makes an account with its default network and answers `{account_id, access_key_id, secret_access_key}`;
//! `POST /packets/capture`, `/trace`, `/counters` and `/flows` look into the packet paths of the cards, see [`packets`];
//! `GET /metrics` and `GET /healthz` are those of the tenants' listener.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::response::Response;
use axum::routing::{get, post};
use serde_json::json;
use tokio::net::UnixListener;

use crate::api::{self, Api, RequestId, response};
use crate::error::ApiError;
use crate::model::Time;
use crate::packets;
use crate::resource::account::create_account;

/// Opens the socket, in place of one that an earlier process left.
///
/// # Errors
/// When the folder does not allow it.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves until `stop` resolves.
///
/// # Errors
/// When the socket fails.
pub async fn serve(listener: UnixListener, api: Arc<Api>, stop: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    let router = Router::new()
        .route("/accounts", post(create))
        .route("/packets/capture", post(packets::capture))
        .route("/packets/counters", post(packets::counters))
        .route("/packets/flows", post(packets::flows))
        .route("/packets/trace", post(packets::trace))
        .route("/healthz", get(api::healthz))
        .route("/metrics", get(api::metrics))
        .with_state(api);
    axum::serve(listener, router).with_graceful_shutdown(stop).await
}

async fn create(State(api): State<Arc<Api>>) -> Response {
    let id = RequestId::new();
    let (created, sequence) = api.world.transact(|tx| create_account(tx, api.world.region(), Time::now()));
    let durable = api.durable(sequence).await;
    match durable.and(created) {
        Ok(created) => {
            tracing::info!(account = created.account_id, "account created");
            let body = json!({
                "account_id": created.account_id,
                "access_key_id": created.access_key_id,
                "secret_access_key": created.secret_access_key,
            });
            response(200, "application/json", &id, body.to_string())
        }
        Err(ApiError { code, message, status }) => {
            let body = json!({"error": {"code": code, "message": message}, "requestId": id.as_str()});
            response(status, "application/json", &id, body.to_string())
        }
    }
}
