//! Archives of `docker save` from before Docker wrote OCI layouts into them: `manifest.json`, a configuration and
//! layers by member name. The layers' digests are known only uncompressed, from the configuration.

use super::{Image, Layer, Layout, LayoutError, check_layers, check_platform, parse, read_section};
use crate::config::{ConfigFile, DockerImage};
use crate::digest::Digest;

/// The image called `tag`, or the only one.
pub(super) fn image(layout: &Layout, tag: Option<&str>) -> Result<Image, LayoutError> {
    let images: Vec<DockerImage> = layout.named_document("manifest.json")?;
    resolve(layout, choose(layout, &images, tag)?, None)
}

/// Every name's image, and those without a name.
pub(super) fn images(layout: &Layout) -> Result<Vec<Image>, LayoutError> {
    let images: Vec<DockerImage> = layout.named_document("manifest.json")?;
    if images.is_empty() {
        return Err(LayoutError::Empty { path: layout.storage.path().to_owned() });
    }
    let mut all = Vec::new();
    for image in &images {
        for name in image.repo_tags.iter().map(Some).chain(image.repo_tags.is_empty().then_some(None)) {
            all.push(resolve(layout, image, name)?);
        }
    }
    Ok(all)
}

/// An image, called `name` or as it calls itself.
fn resolve(layout: &Layout, image: &DockerImage, name: Option<&String>) -> Result<Image, LayoutError> {
    let find = |name: &str| {
        let missing = || LayoutError::Missing { what: name.chars().take(200).collect() };
        layout.storage.find(name)?.ok_or_else(missing)
    };
    let bytes = read_section("configuration", &find(&image.config)?)?;
    let file: ConfigFile = parse("configuration", &bytes)?;
    check_platform(&file)?;
    check_layers(image.layers.len(), file.rootfs.diff_ids.len())?;
    let layers = image.layers.iter().zip(&file.rootfs.diff_ids).map(|(name, diff_id)| {
        let section = find(name)?;
        let size = section.length();
        Ok(Layer { name: name.chars().take(200).collect(), digest: None, diff_id: *diff_id, size, section })
    });
    let layers = layers.collect::<Result<_, LayoutError>>()?;
    let own_name = name.or(image.repo_tags.first()).cloned();
    Ok(Image {
        name: own_name.clone().unwrap_or_else(|| layout.name.clone()),
        own_name,
        digest: Digest::of(&bytes),
        config: file.config,
        config_document: bytes,
        manifest_document: None,
        layers,
    })
}

fn choose<'a>(
    layout: &Layout,
    images: &'a [DockerImage],
    tag: Option<&str>,
) -> Result<&'a DockerImage, LayoutError> {
    let path = || layout.storage.path().to_owned();
    let names = || images.iter().flat_map(|image| image.repo_tags.iter().cloned()).take(50).collect();
    match (tag, images) {
        (_, []) => Err(LayoutError::Empty { path: path() }),
        (None, [image]) => Ok(image),
        (None, _) => Err(LayoutError::SeveralImages { path: path(), names: names() }),
        (Some(tag), _) => {
            let is_called = |name: &String| {
                name == tag || name.strip_suffix(tag).is_some_and(|rest| rest.ends_with(['/', ':']))
            };
            let mut found = images.iter().filter(|image| image.repo_tags.iter().any(is_called));
            match (found.next(), found.next()) {
                (Some(image), None) => Ok(image),
                (Some(_), Some(_)) => Err(LayoutError::SeveralImages { path: path(), names: names() }),
                (None, _) => Err(LayoutError::UnknownTag { path: path(), tag: tag.into(), names: names() }),
            }
        }
    }
}
