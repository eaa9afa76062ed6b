//! Machine images. The operator's images are manifests beside their objects in
//! the image folder; each is a public image of the account [`OPERATOR`], under an
//! id that follows from its name, so it is the same after every start.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::filter::{Filters, Page};
use super::id::IMAGE;
use super::tag;
use crate::error::ApiError;
use crate::model::{BootSource, Image, Time};
use crate::shape::Timestamp;
use crate::shapes::{self, BlockDeviceMapping, DescribeImagesRequest, DescribeImagesResult, EbsBlockDevice};
use crate::world::{Call, Sequence, World};

/// The account that owns the operator's images; AWS's own for Amazon Linux.
pub const OPERATOR: &str = "137112412989";

/// `<name>.json` in the image folder.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    name: String,
    #[serde(default)]
    description: String,
    /// File name of the raw disk in the image folder.
    object: String,
    size_bytes: u64,
    architecture: String,
    platform: String,
    root_device_name: String,
    user: Option<String>,
    boot: Option<BootSource>,
}

/// Why an image folder is not read. A single bad manifest is logged and left out.
#[derive(Debug, thiserror::Error)]
#[error("image folder {}", folder.display())]
pub struct FolderError {
    folder: std::path::PathBuf,
    #[source]
    source: io::Error,
}

/// The id of the operator's image of this name.
pub fn operator_image_id(name: &str) -> String {
    let digits = hex::encode(Sha256::digest(name));
    format!("ami-{}", digits.get(..17).unwrap_or(&digits))
}

/// Makes the operator's images agree with the folder: new manifests are
/// registered, changed ones replaced, those that are gone deregistered.
/// Instances keep what they copied.
///
/// # Errors
/// When the folder cannot be listed.
pub fn register_folder(world: &World, folder: &Path, now: Time) -> Result<Sequence, FolderError> {
    let manifests = read_folder(folder).map_err(|source| FolderError { folder: folder.to_owned(), source })?;
    let mut tx = world.begin();
    let known: BTreeSet<String> = manifests.iter().map(|manifest| operator_image_id(&manifest.name)).collect();
    let gone = tx.list::<Image>(OPERATOR).filter(|image| !known.contains(&image.id));
    let gone: Vec<String> = gone.map(|image| image.id.clone()).collect();
    for id in gone {
        tracing::info!(image = id, "deregistered");
        tx.delete::<Image>(OPERATOR, &id);
    }
    for manifest in manifests {
        let id = operator_image_id(&manifest.name);
        let old = tx.get::<Image>(OPERATOR, &id);
        let image = Image {
            account_id: OPERATOR.to_owned(),
            id,
            name: manifest.name,
            description: manifest.description,
            owner_alias: Some("amazon".to_owned()),
            public: true,
            object: manifest.object,
            size_bytes: manifest.size_bytes,
            architecture: manifest.architecture,
            platform: manifest.platform,
            root_device_name: manifest.root_device_name,
            user: manifest.user,
            boot: manifest.boot,
            created: old.as_ref().map_or(now, |image| image.created),
        };
        if old.is_none_or(|old| *old != image) {
            tracing::info!(image = image.id, name = image.name, "registered");
            tx.put(image);
        }
    }
    Ok(tx.commit())
}

/// How soon a new manifest is an image.
const FOLDER_PERIOD: Duration = Duration::from_secs(2);

/// Calls [`register_folder`] for ever, whenever a file of the folder came, went or changed.
pub async fn watch_folder(world: Arc<World>, folder: PathBuf) {
    let mut known = BTreeSet::new();
    let mut tick = tokio::time::interval(FOLDER_PERIOD);
    loop {
        tick.tick().await;
        let (world, path) = (Arc::clone(&world), folder.clone());
        let seen = std::mem::take(&mut known);
        let looked = tokio::task::spawn_blocking(move || {
            let now = manifests(&path).unwrap_or_default();
            if now != seen
                && let Err(error) = register_folder(&world, &path, Time::now())
            {
                tracing::warn!(error = &error as &dyn std::error::Error, "the image folder cannot be read");
            }
            now
        });
        match looked.await {
            Ok(now) => known = now,
            Err(error) => tracing::error!(%error, "looking for images panicked"),
        }
    }
}

/// Name, time and length of the manifests: what changes when they do.
fn manifests(folder: &Path) -> io::Result<BTreeSet<(PathBuf, Option<SystemTime>, u64)>> {
    let mut found = BTreeSet::new();
    for entry in folder.read_dir()? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == "json") {
            let metadata = entry.metadata()?;
            found.insert((entry.path(), metadata.modified().ok(), metadata.len()));
        }
    }
    Ok(found)
}

fn read_folder(folder: &Path) -> io::Result<Vec<Manifest>> {
    let mut manifests = Vec::new();
    for entry in folder.read_dir()? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match read_manifest(&path) {
            Ok(manifest) => manifests.push(manifest),
            Err(error) => tracing::warn!(path = %path.display(), %error, "not an image manifest"),
        }
    }
    Ok(manifests)
}

fn read_manifest(path: &Path) -> io::Result<Manifest> {
    let manifest: Manifest = serde_json::from_slice(&std::fs::read(path)?)?;
    let boot = manifest.boot.iter().flat_map(|boot| [&boot.kernel, &boot.initrd]);
    let invalid = |message: String| Err(io::Error::new(io::ErrorKind::InvalidData, message));
    for object in boot.chain([&manifest.object]) {
        // An object key is a plain file name: what could name another folder never reaches a card.
        let plain = object.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte));
        if !plain || object.starts_with('.') || 255 < object.len() {
            return invalid(format!("{object:?} is not a plain file name"));
        }
    }
    if manifest.boot.as_ref().is_some_and(|boot| boot.kernel.is_empty() || boot.command_line.contains(['\n', '\0'])) {
        return invalid("boot has a kernel and a command line of one line".to_owned());
    }
    if manifest.size_bytes == 0 || manifest.object.is_empty() || manifest.name.is_empty() {
        return invalid("name, object and size_bytes may not be empty".to_owned());
    }
    Ok(manifest)
}

/// An image that the account may launch: its own or a public one.
pub fn visible(call: &Call<'_>, id: &str) -> Option<Arc<Image>> {
    call.tx.find_all::<Image>("id", id).into_iter().find(|image| image.public || image.account_id == call.account())
}

/// DescribeImages.
///
/// # Errors
/// `InvalidAMIID.NotFound` for an id that the account does not see, `InvalidAMIID.Malformed`; those of filters and pages.
pub fn describe_images(call: &mut Call<'_>, request: DescribeImagesRequest) -> Result<DescribeImagesResult, ApiError> {
    IMAGE.check_all(&request.image_ids)?;
    let filters = Filters::new(request.filters, FILTERS)?;
    let page = Page::new("DescribeImages", request.max_results, request.next_token.as_deref(), 1000)?;
    if let Some(missing) = request.image_ids.iter().find(|id| visible(call, id).is_none()) {
        return Err(IMAGE.not_found(missing));
    }
    let account = call.account();
    let owned = |image: &Image| {
        let is = |owner: &String| match owner.as_str() {
            "self" => image.account_id == account,
            alias => image.account_id == alias || image.owner_alias.as_deref() == Some(alias),
        };
        request.owners.is_empty() || request.owners.iter().any(is)
    };
    let executable = |image: &Image| {
        // There are no launch permissions for single accounts: what is not public is the owner's alone.
        let by = |user: &String| match user.as_str() {
            "all" => image.public,
            "self" => image.account_id == account,
            user => image.account_id == user && user == account,
        };
        request.executable_users.is_empty() || request.executable_users.iter().any(by)
    };
    let named = |image: &Image| request.image_ids.is_empty() || request.image_ids.contains(&image.id);
    let seen = call.tx.all::<Image>().filter(|image| image.public || image.account_id == account);
    let passing = seen.filter(|image| named(image) && owned(image) && executable(image) && passes(call, &filters, image));
    let mut images: Vec<_> = passing.map(|image| (image.id.clone(), shape(call, image))).collect();
    images.sort_by(|a, b| a.0.cmp(&b.0));
    let (images, next_token) = page.take(images);
    Ok(DescribeImagesResult { images, next_token })
}

const FILTERS: &[&str] = &[
    "architecture",
    "block-device-mapping.delete-on-termination",
    "block-device-mapping.device-name",
    "block-device-mapping.volume-size",
    "block-device-mapping.volume-type",
    "creation-date",
    "description",
    "ena-support",
    "hypervisor",
    "image-id",
    "image-type",
    "is-public",
    "name",
    "owner-alias",
    "owner-id",
    "platform",
    "root-device-name",
    "root-device-type",
    "state",
    "tag",
    "virtualization-type",
];

fn passes(call: &Call<'_>, filters: &Filters, image: &Image) -> bool {
    filters.pass(&tag::of(&call.tx, call.account(), &image.id), |name, test| match name {
        "architecture" => test(&image.architecture),
        "block-device-mapping.delete-on-termination" => test("true"),
        "block-device-mapping.device-name" | "root-device-name" => test(&image.root_device_name),
        "block-device-mapping.volume-size" => test(&size_gib(image).to_string()),
        "block-device-mapping.volume-type" => test(ROOT_VOLUME_TYPE),
        "creation-date" => test(&Timestamp::from(image.created).to_text()),
        "description" => test(&image.description),
        "ena-support" => test("true"),
        "hypervisor" => test("xen"),
        "image-id" => test(&image.id),
        "image-type" => test("machine"),
        "is-public" => test(if image.public { "true" } else { "false" }),
        "name" => test(&image.name),
        "owner-alias" => image.owner_alias.as_deref().is_some_and(test),
        "owner-id" => test(&image.account_id),
        "platform" => is_windows(image) && test("windows"),
        "root-device-type" => test("ebs"),
        "state" => test("available"),
        "virtualization-type" => test("hvm"),
        _ => false,
    })
}

/// The type of a root volume when the launch does not say.
pub const ROOT_VOLUME_TYPE: &str = "gp3";

/// The smallest volume that holds the image.
pub fn size_gib(image: &Image) -> u32 {
    u32::try_from(image.size_bytes.div_ceil(1 << 30)).unwrap_or(u32::MAX)
}

fn is_windows(image: &Image) -> bool {
    image.platform.eq_ignore_ascii_case("windows")
}

fn shape(call: &Call<'_>, image: &Image) -> shapes::Image {
    let ebs = EbsBlockDevice {
        delete_on_termination: Some(true),
        encrypted: Some(false),
        volume_size: i32::try_from(size_gib(image)).ok(),
        volume_type: Some(ROOT_VOLUME_TYPE.to_owned()),
        ..Default::default()
    };
    let root = BlockDeviceMapping { device_name: Some(image.root_device_name.clone()), ebs: Some(ebs), ..Default::default() };
    shapes::Image {
        architecture: Some(image.architecture.clone()),
        block_device_mappings: vec![root],
        creation_date: Some(Timestamp::from(image.created).to_text()),
        description: Some(image.description.clone()).filter(|text| !text.is_empty()),
        ena_support: Some(true),
        hypervisor: Some("xen".to_owned()),
        image_id: Some(image.id.clone()),
        image_location: Some(format!("{}/{}", image.owner_alias.as_ref().unwrap_or(&image.account_id), image.name)),
        image_owner_alias: image.owner_alias.clone(),
        image_type: Some("machine".to_owned()),
        name: Some(image.name.clone()),
        owner_id: Some(image.account_id.clone()),
        platform: is_windows(image).then(|| "windows".to_owned()),
        platform_details: Some(platform_details(&image.platform)),
        public: Some(image.public),
        root_device_name: Some(image.root_device_name.clone()),
        root_device_type: Some("ebs".to_owned()),
        state: Some("available".to_owned()),
        tags: tag::shapes(&tag::of(&call.tx, call.account(), &image.id)),
        usage_operation: Some("RunInstances".to_owned()),
        virtualization_type: Some("hvm".to_owned()),
        ..Default::default()
    }
}

/// What EC2 calls the platform in PlatformDetails.
pub fn platform_details(platform: &str) -> String {
    if platform.eq_ignore_ascii_case("linux") { "Linux/UNIX".to_owned() } else { platform.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Principal;
    use crate::world::Region;

    fn manifest(folder: &Path, name: &str, object: &str) {
        let text = format!(
            r#"{{"name":"{name}","description":"d","object":"{object}","size_bytes":1073741825,"architecture":"x86_64","platform":"Linux",
                "root_device_name":"/dev/xvda","user":"ec2-user","boot":{{"kernel":"k","initrd":"i","command_line":"root=/dev/vda"}}}}"#
        );
        std::fs::write(folder.join(format!("{name}.json")), text).unwrap();
    }

    fn describe(world: &World, request: DescribeImagesRequest) -> Result<Vec<String>, String> {
        let principal = Principal::for_test("111111111111");
        let (result, _) = world.call(&principal, Time(0), |call| describe_images(call, request));
        result.map(|answer| answer.images.into_iter().filter_map(|image| image.name).collect()).map_err(|error| error.code.to_string())
    }

    #[test]
    fn the_folder_is_the_truth_about_the_operators_images() {
        let world = World::in_memory(Region::for_tests(), 1);
        let folder = tempfile::tempdir().unwrap();
        manifest(folder.path(), "mini", "mini.raw");
        manifest(folder.path(), "debian-12", "debian-12.raw");
        manifest(folder.path(), "evil", "../../etc/shadow");
        std::fs::write(folder.path().join("torn.json"), "{").unwrap();
        register_folder(&world, folder.path(), Time(5)).unwrap();
        let mut names = describe(&world, DescribeImagesRequest::default()).unwrap();
        names.sort();
        assert_eq!(names, ["debian-12", "mini"]);
        std::fs::remove_file(folder.path().join("mini.json")).unwrap();
        let before = register_folder(&world, folder.path(), Time(6)).unwrap();
        assert_eq!(describe(&world, DescribeImagesRequest::default()).unwrap(), ["debian-12"]);
        assert_eq!(register_folder(&world, folder.path(), Time(7)).unwrap(), before, "an unchanged folder changes nothing");
    }

    #[test]
    fn owners_ids_and_filters_select() {
        let world = World::in_memory(Region::for_tests(), 1);
        let folder = tempfile::tempdir().unwrap();
        manifest(folder.path(), "mini", "mini.raw");
        register_folder(&world, folder.path(), Time(5)).unwrap();
        let owners = |owner: &str| DescribeImagesRequest { owners: vec![owner.to_owned()], ..Default::default() };
        assert_eq!(describe(&world, owners("amazon")).unwrap(), ["mini"]);
        assert_eq!(describe(&world, owners(OPERATOR)).unwrap(), ["mini"]);
        assert!(describe(&world, owners("self")).unwrap().is_empty());
        let id = |id: &str| DescribeImagesRequest { image_ids: vec![id.to_owned()], ..Default::default() };
        assert_eq!(describe(&world, id(&operator_image_id("mini"))).unwrap(), ["mini"]);
        assert_eq!(describe(&world, id("ami-00000000")).unwrap_err(), "InvalidAMIID.NotFound");
        assert_eq!(describe(&world, id("mini")).unwrap_err(), "InvalidAMIID.Malformed");
        let name = |value: &str| {
            let filter = shapes::Filter { name: Some("name".to_owned()), values: vec![value.to_owned()] };
            DescribeImagesRequest { filters: vec![filter], ..Default::default() }
        };
        assert_eq!(describe(&world, name("m?ni*")).unwrap(), ["mini"]);
        assert!(describe(&world, name("windows*")).unwrap().is_empty());
    }
}
