//! The authority of a region: a certificate that vouches for the daemons to each other, and those that it signs.
//!
//! A certificate's DNS name says who its owner is: `control`, or the id of a card. The authority's own parameters are always
//! the same but for its key, so they are made anew from the key each time that it signs.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use time::{Duration, OffsetDateTime};

/// Clocks may differ by this much before a fresh certificate is refused.
const BACKDATE: Duration = Duration::days(1);
const AUTHORITY_LIFE: Duration = Duration::days(3650);
const LEAF_LIFE: Duration = Duration::days(825);

/// Makes `ca.pem` and `ca.key`.
pub fn init(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    if dir.join("ca.key").exists() {
        bail!("{} holds an authority already", dir.display());
    }
    let key = KeyPair::generate().context("generating a key")?;
    let certificate = authority()?.self_signed(&key).context("signing the authority's certificate")?;
    write(&dir.join("ca.pem"), certificate.pem().as_bytes(), 0o644)?;
    write(&dir.join("ca.key"), key.serialize_pem().as_bytes(), 0o600)
}

/// Makes `NAME.pem` and `NAME.key`; replaces those that are there.
pub fn issue(dir: &Path, name: &str) -> Result<()> {
    if name == "ca"
        || name.is_empty()
        || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'))
        || name.starts_with('.')
    {
        bail!("{name:?} is not a DNS name that a certificate can bear");
    }
    let path = dir.join("ca.key");
    let authority_key = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let authority_key = KeyPair::from_pem(&authority_key).with_context(|| format!("{} is not a key", path.display()))?;
    let issuer = Issuer::new(authority()?, authority_key);
    let mut params = CertificateParams::new([name.to_owned()]).context("naming the certificate")?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    live(&mut params, LEAF_LIFE);
    let key = KeyPair::generate().context("generating a key")?;
    let certificate = params.signed_by(&key, &issuer).context("signing the certificate")?;
    write(&dir.join(format!("{name}.pem")), certificate.pem().as_bytes(), 0o644)?;
    write(&dir.join(format!("{name}.key")), key.serialize_pem().as_bytes(), 0o600)
}

fn authority() -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::<String>::new()).context("naming the authority")?;
    params.distinguished_name.push(DnType::CommonName, "Cardinal region authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    live(&mut params, AUTHORITY_LIFE);
    Ok(params)
}

fn live(params: &mut CertificateParams, life: Duration) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BACKDATE;
    params.not_after = now + life;
}

/// Writes a file whole or not at all.
fn write(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let context = || format!("writing {}", path.display());
    let temporary = path.with_extension("tmp");
    // A left-over of a crash may have other permissions.
    let _ = fs::remove_file(&temporary);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary).with_context(context)?;
    file.write_all(content).and_then(|()| file.sync_all()).with_context(context)?;
    fs::rename(&temporary, path).with_context(context)
}
