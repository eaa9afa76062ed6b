//! Key pairs: the public keys that guests let in.
//!
//! A created pair's private half leaves once, in the answer, and is kept nowhere. Making an RSA key takes as long as thousands of
//! other requests, so [`generate`] stands apart: the caller runs it before it opens the transaction.
//!
//! Fingerprints are EC2's: of a created RSA key SHA-1 over the private key (PKCS#8 DER), of an imported one MD5 over the public key
//! (SubjectPublicKeyInfo DER), of an Ed25519 key SHA-256 over the key as SSH sends it, in base64.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use md5::Md5;
use rsa::pkcs1::EncodeRsaPrivateKey as _;
use rsa::pkcs8::{EncodePrivateKey as _, EncodePublicKey as _};
use rsa::rand_core::OsRng;
use rsa::traits::PublicKeyParts as _;
use rsa::{RsaPrivateKey, RsaPublicKey};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};
use ssh_key::public::KeyData;
use ssh_key::{Algorithm, LineEnding, PrivateKey, PublicKey};

use super::filter::Filters;
use super::id::KEY_PAIR;
use super::tag;
use crate::error::ApiError;
use crate::model::KeyPair;
use crate::shapes::{
    self, CreateKeyPairRequest, DeleteKeyPairRequest, DeleteKeyPairResult, DescribeKeyPairsRequest, DescribeKeyPairsResult,
    ImportKeyPairRequest, ImportKeyPairResult, KeyPairInfo,
};
use crate::world::Call;

/// The most key pairs of an account.
const MOST_KEY_PAIRS: usize = 5000;
const LONGEST_NAME: usize = 255;
/// The longest public key that is read.
const LONGEST_KEY: usize = 16 * 1024;
const RSA_BITS: usize = 2048;
const RSA: &str = "rsa";
const ED25519: &str = "ed25519";

/// A new key pair that has no name yet.
pub struct Material {
    kind: &'static str,
    /// PKCS#1 PEM for RSA, OpenSSH PEM for Ed25519.
    private_key: String,
    public_key: PublicKey,
    fingerprint: String,
}

/// Makes the key that a request asks for: up to a second of work for RSA. Not to be called inside a transaction.
///
/// # Errors
/// `InvalidParameterValue` for an unknown type, `UnsupportedOperation` for PuTTY's format, `InternalError` when no key can be made.
pub fn generate(request: &CreateKeyPairRequest) -> Result<Material, ApiError> {
    match request.key_format.as_deref() {
        None | Some("pem") => {}
        Some("ppk") => {
            let message = "The key format ppk is not supported in this region: ask for pem and convert it with puttygen";
            return Err(ApiError::new("UnsupportedOperation", message));
        }
        Some(other) => return Err(ApiError::invalid_parameter("KeyFormat", other)),
    }
    match request.key_type.as_deref() {
        None | Some(RSA) => rsa_material().map_err(|error| failed(&*error)),
        Some(ED25519) => ed25519_material().map_err(|error| failed(&*error)),
        Some(other) => Err(ApiError::invalid_parameter("KeyType", other)),
    }
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

fn failed(error: &(dyn std::error::Error + Send + Sync)) -> ApiError {
    tracing::error!(%error, "no key pair could be made");
    ApiError::internal()
}

fn rsa_material() -> Result<Material, AnyError> {
    let key = RsaPrivateKey::new(&mut OsRng, RSA_BITS)?;
    let fingerprint = colons(&Sha1::digest(key.to_pkcs8_der()?.as_bytes()));
    let private_key = key.to_pkcs1_pem(rsa::pkcs1::LineEnding::LF)?.to_string();
    let public_key = PublicKey::from(KeyData::from(ssh_key::public::RsaPublicKey::try_from(key.to_public_key())?));
    Ok(Material { kind: RSA, private_key, public_key, fingerprint })
}

fn ed25519_material() -> Result<Material, AnyError> {
    let key = PrivateKey::random(&mut OsRng, Algorithm::Ed25519)?;
    let public_key = key.public_key().clone();
    let fingerprint = ssh_fingerprint(&public_key)?;
    Ok(Material { kind: ED25519, private_key: key.to_openssh(LineEnding::LF)?.to_string(), public_key, fingerprint })
}

fn colons(digest: &[u8]) -> String {
    let pairs: Vec<String> = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    pairs.join(":")
}

fn ssh_fingerprint(key: &PublicKey) -> ssh_key::Result<String> {
    Ok(STANDARD.encode(Sha256::digest(key.to_bytes()?)))
}

/// CreateKeyPair, with a key that [`generate`] made before.
///
/// # Errors
/// `InvalidKeyPair.Duplicate`, `InvalidParameterValue` for a bad name, `KeyPairLimitExceeded`, those of tags.
pub fn create_key_pair(call: &mut Call<'_>, request: CreateKeyPairRequest, material: Material) -> Result<shapes::KeyPair, ApiError> {
    let tags = tag::specified(request.tag_specifications, &KEY_PAIR)?;
    let Material { kind, private_key, public_key, fingerprint } = material;
    let row = insert(call, request.key_name, kind, public_key, fingerprint)?;
    tag::set(&mut call.tx, &row.account_id, &KEY_PAIR, &row.id, tags.clone());
    Ok(shapes::KeyPair {
        key_pair_id: Some(row.id),
        key_name: Some(row.name),
        key_fingerprint: Some(row.fingerprint),
        key_material: Some(private_key),
        tags: tag::shapes(&tags),
    })
}

fn insert(call: &mut Call<'_>, name: Option<String>, kind: &str, mut key: PublicKey, fingerprint: String) -> Result<KeyPair, ApiError> {
    let name = name.filter(|name| !name.is_empty()).ok_or_else(|| ApiError::missing_parameter("KeyName"))?;
    if name.len() > LONGEST_NAME || name.trim() != name || !name.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        let message = format!(
            "Value for parameter KeyName is invalid. A name has up to {LONGEST_NAME} printable ASCII characters and no space at its ends."
        );
        return Err(ApiError::invalid_value(message));
    }
    if !call.find::<KeyPair>("name", &name).is_empty() {
        return Err(ApiError::new("InvalidKeyPair.Duplicate", format!("The keypair already exists: '{name}'")));
    }
    if call.list::<KeyPair>().count() >= MOST_KEY_PAIRS {
        return Err(ApiError::new("KeyPairLimitExceeded", "The maximum number of key pairs has been reached."));
    }
    // Guests see the name of the pair as the comment of the key.
    key.set_comment(name.clone());
    let public_key = key.to_openssh().map_err(|error| failed(&error))?;
    let row = KeyPair {
        account_id: call.account().to_owned(),
        id: call.tx.new_id(KEY_PAIR.prefix),
        name,
        kind: kind.to_owned(),
        fingerprint,
        public_key,
        created: call.now,
    };
    call.tx.put(row.clone());
    Ok(row)
}

/// ImportKeyPair: an RSA (1,024 to 4,096 bits) or Ed25519 key, as one OpenSSH line.
///
/// # Errors
/// `InvalidKey.Format`, else as [`create_key_pair`].
pub fn import_key_pair(call: &mut Call<'_>, request: ImportKeyPairRequest) -> Result<ImportKeyPairResult, ApiError> {
    let material = request.public_key_material.ok_or_else(|| ApiError::missing_parameter("PublicKeyMaterial"))?;
    let tags = tag::specified(request.tag_specifications, &KEY_PAIR)?;
    let malformed = || ApiError::new("InvalidKey.Format", "Key is not in valid OpenSSH public key format");
    let text = std::str::from_utf8(&material.0).ok().filter(|text| text.len() <= LONGEST_KEY).ok_or_else(malformed)?;
    let key = PublicKey::from_openssh(text.trim()).map_err(|_| malformed())?;
    let (kind, fingerprint) = match key.key_data() {
        KeyData::Rsa(data) => {
            let key = RsaPublicKey::try_from(data).map_err(|_| malformed())?;
            if !(1024..=4096).contains(&key.n().bits()) {
                return Err(ApiError::new("InvalidKey.Format", "An RSA key has 1024 to 4096 bits"));
            }
            let der = key.to_public_key_der().map_err(|_| malformed())?;
            (RSA, colons(&Md5::digest(der.as_bytes())))
        }
        KeyData::Ed25519(_) => (ED25519, ssh_fingerprint(&key).map_err(|_| malformed())?),
        _ => return Err(ApiError::new("InvalidKey.Format", "Only RSA and ED25519 keys can be imported")),
    };
    let row = insert(call, request.key_name, kind, key, fingerprint)?;
    tag::set(&mut call.tx, &row.account_id, &KEY_PAIR, &row.id, tags.clone());
    Ok(ImportKeyPairResult {
        key_pair_id: Some(row.id),
        key_name: Some(row.name),
        key_fingerprint: Some(row.fingerprint),
        tags: tag::shapes(&tags),
    })
}

/// DeleteKeyPair; a pair that is not there is deleted already.
///
/// # Errors
/// `MissingParameter` without a name and without an id.
pub fn delete_key_pair(call: &mut Call<'_>, request: DeleteKeyPairRequest) -> Result<DeleteKeyPairResult, ApiError> {
    let row = match (request.key_pair_id, request.key_name) {
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid_combination("The parameters KeyName and KeyPairId cannot be used together"));
        }
        (Some(id), None) => call.get::<KeyPair>(&id),
        (None, Some(name)) => call.find::<KeyPair>("name", &name).into_iter().next(),
        (None, None) => return Err(ApiError::missing_parameter("KeyName")),
    };
    if let Some(row) = &row {
        tag::remove(&mut call.tx, &row.account_id, &row.id);
        call.tx.delete::<KeyPair>(&row.account_id, &row.id);
    }
    Ok(DeleteKeyPairResult { r#return: Some(true), key_pair_id: row.map(|row| row.id.clone()) })
}

/// The key pair of a name.
///
/// # Errors
/// `InvalidKeyPair.NotFound`.
pub fn named(call: &Call<'_>, name: &str) -> Result<Arc<KeyPair>, ApiError> {
    let not_found = || ApiError::new("InvalidKeyPair.NotFound", format!("The key pair '{name}' does not exist"));
    call.find::<KeyPair>("name", name).into_iter().next().ok_or_else(not_found)
}

/// DescribeKeyPairs.
///
/// # Errors
/// `InvalidKeyPair.NotFound` and those of filters.
pub fn describe_key_pairs(call: &mut Call<'_>, request: DescribeKeyPairsRequest) -> Result<DescribeKeyPairsResult, ApiError> {
    let filters = Filters::new(request.filters, &["key-pair-id", "fingerprint", "key-name", "tag"])?;
    let mut ids = request.key_pair_ids;
    for name in &request.key_names {
        ids.push(named(call, name)?.id.clone());
    }
    let rows = KEY_PAIR.rows::<KeyPair>(call, &ids)?;
    let passing = rows.values().filter(|row| {
        filters.pass(&tag::of(&call.tx, call.account(), &row.id), |name, test| match name {
            "key-pair-id" => test(&row.id),
            "fingerprint" => test(&row.fingerprint),
            "key-name" => test(&row.name),
            _ => false,
        })
    });
    let shape = |row: &Arc<KeyPair>| KeyPairInfo {
        key_pair_id: Some(row.id.clone()),
        key_name: Some(row.name.clone()),
        key_type: Some(row.kind.clone()),
        key_fingerprint: Some(row.fingerprint.clone()),
        public_key: (request.include_public_key == Some(true)).then(|| row.public_key.clone()),
        create_time: Some(row.created.into()),
        tags: tag::shapes(&tag::of(&call.tx, &row.account_id, &row.id)),
    };
    Ok(DescribeKeyPairsResult { key_pairs: passing.map(shape).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::shape::Blob;

    const RSA_LINE: &str = "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQDa9vWpAdEFFm0t0FhrsH4LBU+34eN8GkwN/lJtVQgdwq3Bfjj0okRt3Ll/xacwYZCKpd8mQJItbR6i2Tyzsw0FedhdiSghv/wOp2k2dPxSZ/mKnDiLIA57JxBaFQpW3iXe+xJJjRhBJOWs4NhgL4umKOdARShwPW1GY/McKm5MjoNKnL0W1YUlHWsl7gT6mnK+NcUsT3T6voX0GNdWSl0UjHOM6JSsNTVnDcCsePb+Cno3tHl/JiAHZmkVfs/DMz8sVf77nBMq8tqhYBFdaRHTjqbuwJRS8WWkKejp7r9fMabcGmS46vnR/YokQ/OpMUUGmYDOkJGopSYSzSVcQAi/ c";
    const RSA_FINGERPRINT: &str = "94:34:ed:17:91:af:c5:a8:7e:84:cb:61:9e:e4:07:22";
    const ED25519_LINE: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJesZ8HocsGORTeUlyUdMqv7KqRwQGVJTqwWgY1w5K8l c";
    const ED25519_FINGERPRINT: &str = "69WVR6CPlxCm7ZqFdYOd54cSt8VJsrdI4RuIKUmglwE=";

    fn create(fixture: &Fixture, account: &str, name: &str, kind: &str) -> Result<shapes::KeyPair, ApiError> {
        let request = CreateKeyPairRequest { key_name: Some(name.into()), key_type: Some(kind.into()), ..Default::default() };
        let material = generate(&request).unwrap();
        fixture.call(account, |call| create_key_pair(call, request, material))
    }

    fn import(fixture: &Fixture, name: &str, key: &[u8]) -> Result<ImportKeyPairResult, ApiError> {
        let request =
            ImportKeyPairRequest { key_name: Some(name.into()), public_key_material: Some(Blob(key.to_vec())), ..Default::default() };
        fixture.call(ALICE, |call| import_key_pair(call, request))
    }

    fn stored(fixture: &Fixture, name: &str) -> KeyPair {
        let tx = fixture.world.begin();
        KeyPair::clone(&tx.find::<KeyPair>(ALICE, "name", name)[0])
    }

    #[test]
    fn a_created_rsa_key_opens_its_public_half_and_is_not_kept() {
        let fixture = Fixture::new();
        let pair = create(&fixture, ALICE, "rsa", "rsa").unwrap();
        let pem = pair.key_material.unwrap();
        assert!(pem.starts_with("-----BEGIN RSA PRIVATE KEY-----\n"));
        let key = <RsaPrivateKey as rsa::pkcs1::DecodeRsaPrivateKey>::from_pkcs1_pem(&pem).unwrap();
        assert_eq!(key.n().bits(), 2048);
        let row = stored(&fixture, "rsa");
        let line = PublicKey::from_openssh(&row.public_key).unwrap();
        assert_eq!(RsaPublicKey::try_from(line.key_data().rsa().unwrap()).unwrap(), key.to_public_key());
        assert_eq!(line.comment(), "rsa");
        assert_eq!(row.fingerprint.len(), 59, "20 bytes of SHA-1");
        let document = serde_json::to_string(&row).unwrap();
        let secret: String = pem.lines().filter(|line| !line.starts_with('-')).take(3).collect();
        assert!(!document.contains("PRIVATE") && !document.contains(&secret));
    }

    #[test]
    fn a_created_ed25519_key_is_an_openssh_key() {
        let fixture = Fixture::new();
        let pair = create(&fixture, ALICE, "ed", "ed25519").unwrap();
        let key = PrivateKey::from_openssh(pair.key_material.unwrap()).unwrap();
        let row = stored(&fixture, "ed");
        assert_eq!(PublicKey::from_openssh(&row.public_key).unwrap().key_data(), key.public_key().key_data());
        assert_eq!((row.kind.as_str(), row.fingerprint), ("ed25519", ssh_fingerprint(key.public_key()).unwrap()));
    }

    #[test]
    fn imported_keys_have_the_fingerprints_of_openssl_and_ssh_keygen() {
        let fixture = Fixture::new();
        assert_eq!(import(&fixture, "rsa", RSA_LINE.as_bytes()).unwrap().key_fingerprint.as_deref(), Some(RSA_FINGERPRINT));
        assert_eq!(import(&fixture, "ed", ED25519_LINE.as_bytes()).unwrap().key_fingerprint.as_deref(), Some(ED25519_FINGERPRINT));
        assert!(stored(&fixture, "ed").public_key.ends_with(" ed"), "the comment is the name of the pair");
    }

    #[test]
    fn what_is_no_rsa_or_ed25519_line_is_refused() {
        let fixture = Fixture::new();
        let cut = &RSA_LINE[..RSA_LINE.len() / 2];
        let ecdsa = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBMC8M+Ck8moWX6z7OrYxfc+Arxm1snOBNPSSQRnu65QVax97GaMBiyGOe9mmoSMyhdPk8WU5Lk6+RIipxRsqSMI= c";
        let short = "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAYQCMg5yK1J9KmNXPu5Wx7dfY7HB0o0wrBHl7O1Ss0IUS6ds3khwIb0era55OM1JFl7NCnWbTGYYpLj8i/05G5292wxx156O5VQSkIkGRmi2M9WwxQCG2Q3SC+0xfV0ChzoM=";
        let long = "ssh-rsa ".to_owned() + &"A".repeat(LONGEST_KEY);
        for key in
            ["", "hello", "ssh-rsa", "ssh-rsa AAAA", cut, ecdsa, short, &long, "-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----"]
        {
            assert_eq!(import(&fixture, "bad", key.as_bytes()).unwrap_err().code, "InvalidKey.Format", "{key}");
        }
        assert_eq!(import(&fixture, "bad", &[0xff, 0xfe]).unwrap_err().code, "InvalidKey.Format");
    }

    #[test]
    fn names_are_unique_in_an_account() {
        let fixture = Fixture::new();
        create(&fixture, ALICE, "one", "ed25519").unwrap();
        assert_eq!(create(&fixture, ALICE, "one", "ed25519").unwrap_err().code, "InvalidKeyPair.Duplicate");
        create(&fixture, BOB, "one", "ed25519").unwrap();
        for name in ["", " x", "ümlaut", "a\nb", &"x".repeat(256)] {
            let code = create(&fixture, ALICE, name, "ed25519").unwrap_err().code;
            assert!(matches!(code.as_ref(), "InvalidParameterValue" | "MissingParameter"), "{name:?}");
        }
    }

    #[test]
    fn unknown_types_and_formats_are_refused_before_any_work() {
        let request = |kind: &str, format: &str| CreateKeyPairRequest {
            key_name: Some("x".into()),
            key_type: Some(kind.into()),
            key_format: Some(format.into()),
            ..Default::default()
        };
        assert_eq!(generate(&request("dsa", "pem")).err().unwrap().code, "InvalidParameterValue");
        assert_eq!(generate(&request("rsa", "ppk")).err().unwrap().code, "UnsupportedOperation");
        assert_eq!(generate(&request("rsa", "der")).err().unwrap().code, "InvalidParameterValue");
    }

    #[test]
    fn pairs_are_described_and_deleted_by_name_or_id() {
        let fixture = Fixture::new();
        let id = create(&fixture, ALICE, "one", "ed25519").unwrap().key_pair_id.unwrap();
        let describe = |request: DescribeKeyPairsRequest| fixture.call(ALICE, |call| describe_key_pairs(call, request));
        let by_name = |name: &str| DescribeKeyPairsRequest { key_names: vec![name.into()], ..Default::default() };
        let shown = describe(DescribeKeyPairsRequest { include_public_key: Some(true), ..by_name("one") }).unwrap().key_pairs;
        assert_eq!(shown[0].key_pair_id.as_ref(), Some(&id));
        assert!(shown[0].public_key.as_ref().unwrap().starts_with("ssh-ed25519 "));
        assert_eq!(describe(by_name("one")).unwrap().key_pairs[0].public_key, None);
        let delete = || DeleteKeyPairRequest { key_pair_id: Some(id.clone()), ..Default::default() };
        fixture.call(BOB, |call| delete_key_pair(call, delete())).unwrap();
        assert_eq!(describe(by_name("one")).unwrap().key_pairs.len(), 1, "a foreign delete deletes nothing");
        fixture.call(ALICE, |call| delete_key_pair(call, delete())).unwrap();
        assert_eq!(describe(by_name("one")).unwrap_err().code, "InvalidKeyPair.NotFound");
        fixture.call(ALICE, |call| delete_key_pair(call, delete())).unwrap();
    }
}
