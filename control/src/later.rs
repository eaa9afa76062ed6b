//! Actions that cannot be done inside one transaction: making an RSA key takes as long as thousands of other requests, and
//! console bytes live on the card and nowhere else.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use tokio::sync::Semaphore;

use crate::api::Api;
use crate::auth::Principal;
use crate::error::ApiError;
use crate::model::Time;
use crate::resource::{instance, key_pair};
use crate::shape::{Request as _, Timestamp};
use crate::shapes::{CreateKeyPairRequest, GetConsoleOutputRequest, GetConsoleOutputResult, KeyPair};

/// Keys in the making at one time: they take a core each, which others need too.
static KEY_MAKERS: Semaphore = Semaphore::const_new(1);

/// CreateKeyPair: makes the key aside, then stores its public half in a transaction.
///
/// # Errors
/// Those of [`key_pair::generate`] and [`key_pair::create_key_pair`].
pub async fn create_key_pair(api: &Api, principal: &Principal, request: CreateKeyPairRequest) -> Result<KeyPair, ApiError> {
    let turn = KEY_MAKERS.acquire().await.map_err(|_| ApiError::internal())?;
    let made = tokio::task::spawn_blocking(move || key_pair::generate(&request).map(|material| (request, material))).await;
    drop(turn);
    let (request, material) = made.map_err(|error| {
        tracing::error!(%error, "making a key panicked");
        ApiError::internal()
    })??;
    let dry_run = request.dry_run();
    let (pair, sequence) = api.act(principal, dry_run, |call| key_pair::create_key_pair(call, request, material));
    api.durable(sequence).await?;
    pair
}

/// GetConsoleOutput: the newest console bytes of an instance, base64; none for an instance without a machine.
///
/// # Errors
/// The answers about the id; `Unavailable` while its card does not answer.
pub async fn get_console_output(
    api: &Api,
    principal: &Principal,
    request: GetConsoleOutputRequest,
) -> Result<GetConsoleOutputResult, ApiError> {
    let dry_run = request.dry_run();
    let id = request.instance_id.ok_or_else(|| ApiError::missing_parameter("InstanceId"))?;
    let (card, sequence) = api.act(principal, dry_run, |call| instance::console_card(call, &id));
    api.durable(sequence).await?;
    let (output, at) = match (card?, &api.cards) {
        (Some(card), Some(cards)) => {
            let (output, at_s) = cards.console_output(&card, &id).await.map_err(|error| {
                tracing::warn!(instance = id, card, error = &error as &dyn std::error::Error, "the console was not read");
                ApiError::unavailable("The console of the instance cannot be read at present")
            })?;
            let at_ms = i64::try_from(at_s).unwrap_or(i64::MAX).saturating_mul(1_000);
            (Some(BASE64.encode(output)), Timestamp::from_unix_ms(at_ms))
        }
        _ => (None, Timestamp::from(Time::now())),
    };
    Ok(GetConsoleOutputResult { instance_id: Some(id), output, timestamp: Some(at) })
}
