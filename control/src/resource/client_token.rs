//! Idempotence: a repeated request with the same client token makes nothing new.
//!
//! The token is bound, for its account and action, to a hash of the request and
//! to the id of what was made; the repeated answer is rebuilt from that id.

use std::fmt::Debug;

use sha2::{Digest as _, Sha256};

use crate::error::ApiError;
use crate::model::{ClientToken, Time};
use crate::world::{Call, Tx};

const LONGEST: usize = 64;

/// Tokens are good for at least a day.
const KEPT_MS: u64 = 24 * 60 * 60 * 1000;

/// A client token that no request of this action has used yet, or no token at all.
pub struct Fresh(Option<(String, String)>);

/// What a request's client token says.
pub enum Checked {
    /// The first request: do it, then [`Fresh::remember`].
    First(Fresh),
    /// A repetition: the id of what the first request made.
    Repeated(String),
}

/// Looks a token up. `request` is the request without its token and its dry-run flag.
///
/// # Errors
/// `InvalidParameterValue` for a token that is too long or not ASCII, `IdempotentParameterMismatch`
/// when the token came with another request.
pub fn check(call: &Call<'_>, action: &str, token: Option<&str>, request: &impl Debug) -> Result<Checked, ApiError> {
    let Some(token) = token.filter(|token| !token.is_empty()) else { return Ok(Checked::First(Fresh(None))) };
    if LONGEST < token.len() || !token.is_ascii() {
        return Err(ApiError::invalid_value(format!("The client token may have at most {LONGEST} ASCII characters")));
    }
    let id = format!("{action}/{token}");
    let hash = hex::encode(Sha256::digest(format!("{request:?}")));
    match call.get::<ClientToken>(&id) {
        None => Ok(Checked::First(Fresh(Some((id, hash))))),
        Some(row) if row.request == hash => Ok(Checked::Repeated(row.result.clone())),
        Some(_) => {
            let message = "The request uses the same client token as a previous, but non-identical request. Do not reuse a client token with different requests, unless the requests are identical";
            Err(ApiError::new("IdempotentParameterMismatch", message))
        }
    }
}

impl Fresh {
    /// Binds the token to the id of what the request made.
    pub fn remember(self, call: &mut Call<'_>, result: &str) {
        let Some((id, request)) = self.0 else { return };
        let account_id = call.account().to_owned();
        let created = call.now;
        call.tx.put(ClientToken { account_id, id, request, result: result.to_owned(), created });
    }
}

/// Forgets tokens that are older than a day.
pub fn expire(tx: &mut Tx<'_>, now: Time) {
    let old = tx.all::<ClientToken>().filter(|row| KEPT_MS < now.since_ms(row.created));
    let old: Vec<_> = old.map(|row| (row.account_id.clone(), row.id.clone())).collect();
    for (account, id) in old {
        tx.delete::<ClientToken>(&account, &id);
    }
}
