//! Who is speaking: verifies the signature of a request and makes its [`Principal`].
//!
//! Nothing else can make a principal, and nothing behind this module sees an access key. The errors follow EC2: a credential
//! that cannot be validated and a signature that does not match are both `AuthFailure` there, while STS and the REST interface
//! tell them apart. Signing keys are derived once for each (access key, day, service) and kept.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use sigv4::{Claim, Refusal, SigningKey};

use crate::error::ApiError;
use crate::model::{AccessKey, REGION, Time};
use crate::world::World;

/// Derived keys that are kept; beyond this many all are dropped and derived again as needed.
const KEPT_KEYS: usize = 10_000;

/// Whom a verified signature speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    account_id: String,
}

impl Principal {
    /// The account, 12 digits.
    #[must_use]
    pub fn account_id(&self) -> &str {
        &self.account_id
    }

    /// The name of the principal: the root of its account.
    #[must_use]
    pub fn arn(&self) -> String {
        format!("arn:aws:iam::{}:root", self.account_id)
    }

    /// A principal without a signature, for tests of what comes behind.
    #[cfg(test)]
    pub(crate) fn for_test(account_id: &str) -> Self {
        Self { account_id: account_id.to_owned() }
    }
}

/// The services that share our endpoint; the signature names one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Service {
    /// `ec2`
    Ec2,
    /// `sts`
    Sts,
    /// `execute-api`: the REST interface.
    ExecuteApi,
}

impl Service {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "ec2" => Some(Self::Ec2),
            "sts" => Some(Self::Sts),
            "execute-api" => Some(Self::ExecuteApi),
            _ => None,
        }
    }
}

/// Verifies requests to one region.
#[derive(Debug, Default)]
pub struct Verifier {
    keys: Mutex<HashMap<KeyName, SigningKey>>,
}

/// (access key id, date, service); the region is one.
type KeyName = (String, String, Service);

impl Verifier {
    /// Says who signed the request, and for which service.
    ///
    /// # Errors
    /// EC2's code for what is wrong with the signature.
    pub fn verify(&self, world: &World, request: sigv4::Request<'_>, now: Time) -> Result<(Principal, Service), ApiError> {
        let claim = Claim::read(request).map_err(|refusal| answer(None, &refusal))?;
        let service = Service::parse(&claim.service).ok_or_else(|| {
            let message = format!("Credential should be scoped to correct service: 'ec2', not '{}'.", claim.service);
            ApiError::with_status(403, "SignatureDoesNotMatch", message)
        })?;
        if claim.region != world.region().name {
            let message = format!("Credential should be scoped to a valid region, not '{}'.", claim.region);
            return Err(ApiError::with_status(403, "SignatureDoesNotMatch", message));
        }
        // There are no temporary credentials here, so a token can only be of someone else's making.
        if claim.session_token.is_some() {
            return Err(unknown_credentials(service));
        }
        let (access_key, _) = world.read(|tx| tx.get::<AccessKey>(REGION, &claim.access_key_id));
        let access_key = access_key.ok_or_else(|| unknown_credentials(service))?;
        let key = self.signing_key(&claim, service, &access_key.secret);
        let now_s = i64::try_from(now.seconds()).unwrap_or(i64::MAX);
        claim.verify(&key, now_s).map_err(|refusal| answer(Some(service), &refusal))?;
        Ok((Principal { account_id: access_key.account_id.clone() }, service))
    }

    fn signing_key(&self, claim: &Claim<'_>, service: Service, secret: &str) -> SigningKey {
        let name = (claim.access_key_id.clone(), claim.date.clone(), service);
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(key) = keys.get(&name) {
            return key.clone();
        }
        if KEPT_KEYS <= keys.len() {
            keys.clear();
        }
        let key = SigningKey::derive(secret, &claim.date, &claim.region, &claim.service);
        keys.insert(name, key.clone());
        key
    }
}

fn unknown_credentials(service: Service) -> ApiError {
    match service {
        Service::Ec2 => ApiError::with_status(401, "AuthFailure", "AWS was not able to validate the provided access credentials"),
        Service::Sts | Service::ExecuteApi => {
            let message = "The security token included in the request is invalid.";
            ApiError::with_status(403, "InvalidClientTokenId", message)
        }
    }
}

fn answer(service: Option<Service>, refusal: &Refusal) -> ApiError {
    let (status, code) = match refusal {
        Refusal::Unsigned => (403, "MissingAuthenticationToken"),
        Refusal::Incomplete(_) => (400, "IncompleteSignature"),
        Refusal::Expired => (400, "RequestExpired"),
        Refusal::Mismatch if service == Some(Service::Ec2) => return unknown_credentials(Service::Ec2),
        Refusal::ScopeDate { .. } | Refusal::Mismatch => (403, "SignatureDoesNotMatch"),
    };
    ApiError::with_status(status, code, refusal.to_string())
}
