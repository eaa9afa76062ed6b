//! What a tenant is told when a call fails: EC2's code, a sentence, and the HTTP status.
//!
//! Codes and sentences follow the page "Error codes for the Amazon EC2 API"; clients match on codes, people read the
//! sentences. Both skins (Query and REST) send the same error in their own clothes.

use std::borrow::Cow;

/// An error as the tenant sees it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ApiError {
    /// EC2's code, as `InvalidVpcID.NotFound`.
    pub code: Cow<'static, str>,
    /// A sentence for people.
    pub message: String,
    /// The HTTP status of the Query protocol; mostly 400.
    pub status: u16,
}

impl ApiError {
    /// A client's mistake, answered with status 400.
    #[must_use]
    pub fn new(code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::with_status(400, code, message)
    }

    /// An error with its own status.
    #[must_use]
    pub fn with_status(status: u16, code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), status }
    }

    /// `MissingParameter`.
    #[must_use]
    pub fn missing_parameter(name: &str) -> Self {
        Self::new("MissingParameter", format!("The request must contain the parameter {name}"))
    }

    /// `UnknownParameter`.
    #[must_use]
    pub fn unknown_parameter(name: &str) -> Self {
        Self::new("UnknownParameter", format!("The parameter {name} is not recognized"))
    }

    /// `InvalidParameterValue` with a sentence of the caller's.
    #[must_use]
    pub fn invalid_value(message: impl Into<String>) -> Self {
        Self::new("InvalidParameterValue", message)
    }

    /// `InvalidParameterValue` in the usual words: the value `value` of the parameter `name` is not acceptable.
    #[must_use]
    pub fn invalid_parameter(name: &str, value: &str) -> Self {
        Self::invalid_value(format!("Value ({value}) for parameter {name} is invalid."))
    }

    /// `InvalidParameterCombination` with a sentence of the caller's.
    #[must_use]
    pub fn invalid_combination(message: impl Into<String>) -> Self {
        Self::new("InvalidParameterCombination", message)
    }

    /// `<code>.NotFound`, as (`InvalidVpcID`, `vpc ID`, `vpc-1`): "The vpc ID 'vpc-1' does not exist".
    #[must_use]
    pub fn not_found(code: &str, noun: &str, id: &str) -> Self {
        Self::new(format!("{code}.NotFound"), format!("The {noun} '{id}' does not exist"))
    }

    /// `<code>.Malformed`, as (`InvalidInstanceID`, `i-x`, `i-...`): `Invalid id: "i-x" (expecting "i-...")`.
    #[must_use]
    pub fn malformed_id(code: &str, id: &str, expecting: &str) -> Self {
        Self::new(format!("{code}.Malformed"), format!("Invalid id: \"{id}\" (expecting \"{expecting}\")"))
    }

    /// `DependencyViolation` with a sentence of the caller's.
    #[must_use]
    pub fn dependency(message: impl Into<String>) -> Self {
        Self::new("DependencyViolation", message)
    }

    /// `InvalidAction`: no such operation here.
    #[must_use]
    pub fn invalid_action(action: &str) -> Self {
        Self::new("InvalidAction", format!("The action {action} is not valid for this web service."))
    }

    /// `DryRunOperation`: the call would have done its work.
    #[must_use]
    pub fn dry_run() -> Self {
        let message = "Request would have succeeded, but DryRun flag is set.";
        Self::with_status(412, "DryRunOperation", message)
    }

    /// `RequestLimitExceeded`: the account is throttled, and may come again.
    #[must_use]
    pub fn request_limit_exceeded() -> Self {
        Self::with_status(503, "RequestLimitExceeded", "Request limit exceeded.")
    }

    /// `InternalError`: our own mistake. The chain of causes belongs in the log, not here.
    #[must_use]
    pub fn internal() -> Self {
        Self::with_status(500, "InternalError", "An internal error has occurred")
    }

    /// `Unavailable`: something below does not answer at present.
    #[must_use]
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::with_status(503, "Unavailable", message)
    }
}
