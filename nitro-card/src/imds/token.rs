//! Session tokens of the metadata service (IMDSv2).
//!
//! ```text
//! base64url( expiry, Unix s (64) | nonce (64) | HMAC-SHA256(key, expiry | nonce | instance id) )
//! ```
//!
//! A token proves itself, so nothing is kept for it: it is good for one
//! instance until it expires, also after a restart of the card, because the
//! key lies on the card's disk.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Longest life of a token.
pub const TTL_MAX_S: u64 = 21600;

const KEY_BYTES: usize = 32;
const TOKEN_BYTES: usize = 48;

/// The card's secret for tokens.
#[derive(Clone)]
pub struct TokenKey([u8; KEY_BYTES]);

impl TokenKey {
    /// Reads the key of the card from `path`, or makes one there that only its owner reads.
    ///
    /// # Errors
    /// What the file system or the source of randomness says.
    pub fn load(path: &Path) -> io::Result<Self> {
        match fs::read(path) {
            Ok(bytes) => return bytes.try_into().map(Self).map_err(|_| io::Error::other("the key has not 32 bytes")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut key = [0; KEY_BYTES];
        getrandom::fill(&mut key).map_err(io::Error::other)?;
        let beside = path.with_extension("tmp");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(&key)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        Ok(Self(key))
    }

    /// A token for `instance` that is good until `expiry_s`.
    #[must_use]
    pub fn issue(&self, instance: &str, expiry_s: u64, nonce: [u8; 8]) -> String {
        let expiry = expiry_s.to_be_bytes();
        let seal = self.seal(instance, &expiry, &nonce).finalize().into_bytes();
        URL_SAFE_NO_PAD.encode([&expiry, &nonce, seal.as_slice()].concat())
    }

    /// Seconds that `token` is still good for, if it is good for `instance` at `now_s`.
    #[must_use]
    pub fn check(&self, instance: &str, token: &[u8], now_s: u64) -> Option<u64> {
        let bytes: [u8; TOKEN_BYTES] = URL_SAFE_NO_PAD.decode(token).ok()?.try_into().ok()?;
        let (expiry, rest) = bytes.split_first_chunk::<8>()?;
        let (nonce, seal) = rest.split_first_chunk::<8>()?;
        // Compares in constant time.
        self.seal(instance, expiry, nonce).verify_slice(seal).ok()?;
        u64::from_be_bytes(*expiry).checked_sub(now_s).filter(|left| 0 < *left)
    }

    fn seal(&self, instance: &str, expiry: &[u8; 8], nonce: &[u8; 8]) -> Hmac<Sha256> {
        // A block of HMAC-SHA256 is 64 bytes: a shorter key is padded with zeros.
        let mut block = [0; 64];
        block.iter_mut().zip(self.0).for_each(|(to, from)| *to = from);
        let mut seal = Hmac::<Sha256>::new(&block.into());
        seal.update(expiry);
        seal.update(nonce);
        seal.update(instance.as_bytes());
        seal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_instance_until_it_expires() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imds.key");
        let token = TokenKey::load(&path).unwrap().issue("i-1", 100, [7; 8]);
        let key = TokenKey::load(&path).unwrap();
        assert_eq!(key.check("i-1", token.as_bytes(), 40), Some(60));
        assert_eq!(key.check("i-1", token.as_bytes(), 100), None);
        assert_eq!(key.check("i-2", token.as_bytes(), 40), None);
        assert_eq!(TokenKey([0; 32]).check("i-1", token.as_bytes(), 40), None);
    }

    #[test]
    fn a_changed_token_is_refused() {
        let key = TokenKey([1; 32]);
        let token = key.issue("i-1", 100, [7; 8]).into_bytes();
        for at in 0..token.len() {
            let mut changed = token.clone();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            assert_eq!(key.check("i-1", &changed, 1), None);
            assert_eq!(key.check("i-1", &token[..at], 1), None);
        }
    }
}
