/// Why a credential was refused.
#[doc(alias = "401")]
#[doc(alias = "403")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// 401: fal saw no credential, although one was sent.
    MissingCredential,
    /// 401: the key is not of the form `id:secret`.
    MalformedCredential,
    /// 401: an API key sent as `Bearer`, or a login's token to a host that takes keys only.
    WrongScheme,
    /// 401: fal does not know the key, or the token is invalid. A newer credential cures this reason and no other.
    UnknownCredential,
    /// 403: the account is locked. Neither another key of it nor another try helps.
    AccountLocked(LockReason),
    /// 403: the credential is valid and lacks a permission.
    InsufficientPermissions,
    /// 403: the credential is valid, but it does not give access to this.
    AccessDenied,
    /// 401 or 403: the application behind fal refused the request, by rules of its own.
    Application,
    /// 401 or 403: none of the above.
    Unknown,
}

impl Reason {
    /// Whether another key may be accepted where this one was refused, so that it is worth waiting for one.
    pub(crate) fn is_cured_by_another_key(self) -> bool {
        matches!(self, Self::UnknownCredential | Self::Unknown)
    }

    /// A short name that does not change, for labels and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MissingCredential => "missing_credential",
            Self::MalformedCredential => "malformed_credential",
            Self::WrongScheme => "wrong_scheme",
            Self::UnknownCredential => "unknown_credential",
            Self::AccountLocked(_) => "account_locked",
            Self::InsufficientPermissions => "insufficient_permissions",
            Self::AccessDenied => "access_denied",
            Self::Application => "application",
            Self::Unknown => "unknown",
        }
    }
}

/// Why fal has locked an account.
///
/// Source: fal-ai/fal issues #489, #914, #922, #1072, #1112 and #1147.
#[doc(alias = "balance")]
#[doc(alias = "billing")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LockReason {
    /// The balance is used up.
    ExhaustedBalance,
    /// fal's staff has locked it.
    Admin,
    /// A top-up is due.
    TopUp,
    /// The account was archived.
    Archived,
    /// There is no payment method.
    NoPaymentMethod,
    /// The user's budget within a team is used up.
    BudgetExceeded,
    /// Any other.
    Other,
}

impl LockReason {
    /// What helps, as the rest of a sentence.
    pub(super) fn what_to_do(self) -> &'static str {
        match self {
            Self::ExhaustedBalance => "its balance is exhausted, top up at fal.ai/dashboard/billing",
            Self::Admin => "fal's staff has locked it, write to support@fal.ai",
            Self::TopUp => "a top-up is due, at fal.ai/dashboard/billing",
            Self::Archived => "it has been archived, write to support@fal.ai",
            Self::NoPaymentMethod => "it has no payment method, add one at fal.ai/dashboard/billing",
            Self::BudgetExceeded => "the user's budget is used up, have it raised by an admin of the team",
            Self::Other => "see fal.ai/dashboard, or write to support@fal.ai",
        }
    }
}
