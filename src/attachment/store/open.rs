//! Opening the object store that `POSTROOM_STORAGE_URL` names.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{HttpClient, HttpConnector};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::signer::Signer;
use object_store::{ClientConfigKey, ClientOptions, ObjectStore, RetryConfig};
use url::Url;

use super::Store;
use crate::config;
use crate::egress;

/// S3 accepts no longer presigned link.
const MAX_LINK_LIFETIME: Duration = Duration::from_hours(7 * 24);

/// Time limit of one connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Time without a byte after which a request has failed.
const READ_TIMEOUT: Duration = Duration::from_secs(20);

/// What is wrong with the object store, for the operator.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The URL cannot be read.
    #[error(
        "POSTROOM_STORAGE_URL is not a URL like s3://bucket/prefix, gs://bucket, az://container or file:///folder"
    )]
    Url,
    /// A scheme nobody knows.
    #[error("POSTROOM_STORAGE_URL begins with `{0}:`; use s3, gs, az or file")]
    Scheme(String),
    /// The base of links cannot be read.
    #[error("POSTROOM_STORAGE_PUBLIC_URL is not an http or https URL")]
    PublicUrl,
    /// A folder cannot sign links.
    #[error(
        "set POSTROOM_STORAGE_PUBLIC_URL, the web address of the folder: links into file:// cannot be presigned"
    )]
    PublicUrlRequired,
    /// The folder cannot be made or opened.
    #[error("the folder of POSTROOM_STORAGE_URL cannot be used: {0}")]
    Folder(std::io::Error),
    /// The settings of the provider are incomplete or wrong.
    #[error("the object store's settings (AWS_*, GOOGLE_* or AZURE_* variables) cannot be used: {0}")]
    Settings(String),
    /// No HTTP client.
    #[error("no HTTP client can be set up: are there any trusted certificate authorities on this machine?")]
    HttpClient,
    /// It does not answer, or refuses to take a file.
    #[error("the object store does not take files: {0}")]
    Unreachable(String),
}

impl Store {
    /// Opens the store with the provider's usual variables from the environment.
    ///
    /// # Errors
    /// If the settings cannot be used. Whether the store answers is not tried.
    pub fn open(config: &config::Storage) -> Result<Self, StorageError> {
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self::open_with(config, variables)
    }

    /// Like [`Store::open`], with these variables for S3 in place of those in the environment.
    ///
    /// # Errors
    /// If the settings cannot be used.
    pub fn open_with(
        config: &config::Storage,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, StorageError> {
        egress::install_crypto_provider();
        let url = Url::parse(&config.url).map_err(|_| StorageError::Url)?;
        let public_url = config.public_url.as_deref().map(parse_public).transpose()?;
        let mut temporary_credentials = false;
        let (objects, signer): (Arc<dyn ObjectStore>, Option<Arc<dyn Signer>>) = match url.scheme() {
            "s3" => {
                let (store, temporary) = s3(bucket(&url)?, variables)?;
                temporary_credentials = temporary;
                pair(store)
            }
            "gs" => pair(google(bucket(&url)?)?),
            "az" => pair(azure(bucket(&url)?)?),
            "file" if public_url.is_none() => return Err(StorageError::PublicUrlRequired),
            "file" => (folder(&url)?, None),
            other => return Err(StorageError::Scheme(other.to_owned())),
        };
        let prefix = if signer.is_some() { url.path() } else { "" };
        Ok(Self {
            keeps_attributes: signer.is_some(),
            objects,
            signer,
            prefix: Path::from_url_path(prefix).map_err(|_| StorageError::Url)?,
            public_url,
            link_lifetime: config.link_lifetime.min(MAX_LINK_LIFETIME),
            temporary_credentials,
        })
    }
}

fn pair<T: ObjectStore + Signer>(store: T) -> (Arc<dyn ObjectStore>, Option<Arc<dyn Signer>>) {
    let store = Arc::new(store);
    (Arc::clone(&store) as Arc<dyn ObjectStore>, Some(store))
}

fn bucket(url: &Url) -> Result<&str, StorageError> {
    url.host_str()
        .filter(|host| !host.is_empty())
        .ok_or(StorageError::Url)
}

fn parse_public(text: &str) -> Result<Url, StorageError> {
    Url::parse(text)
        .ok()
        .filter(|url| {
            matches!(url.scheme(), "http" | "https") && url.query().is_none() && url.fragment().is_none()
        })
        .ok_or(StorageError::PublicUrl)
}

/// S3 with the `AWS_*` variables. With an own endpoint the bucket stands in the path, unless
/// `AWS_VIRTUAL_HOSTED_STYLE_REQUEST` says otherwise; an endpoint with `http:` may be used as it is. Also whether the
/// credentials are temporary: with a session token, or without an access key, so that they come from a role.
fn s3(
    bucket: &str,
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<(object_store::aws::AmazonS3, bool), StorageError> {
    let mut builder = AmazonS3Builder::new();
    for (name, value) in variables {
        let key = name
            .starts_with("AWS_")
            .then(|| name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>());
        if let Some(Ok(key)) = key {
            builder = builder.with_config(key, value);
        }
    }
    if builder
        .get_config_value(&AmazonS3ConfigKey::Endpoint)
        .is_some_and(|url| url.starts_with("http://"))
    {
        builder = builder.with_allow_http(true);
    }
    let given = |key| {
        builder
            .get_config_value(&key)
            .is_some_and(|value| !value.is_empty())
    };
    let temporary = given(AmazonS3ConfigKey::Token) || !given(AmazonS3ConfigKey::AccessKeyId);
    let store = builder
        .with_bucket_name(bucket)
        .with_http_connector(Direct)
        .with_retry(retries())
        .build()
        .map_err(|error| settings(&error))?;
    Ok((store, temporary))
}

fn google(bucket: &str) -> Result<object_store::gcp::GoogleCloudStorage, StorageError> {
    GoogleCloudStorageBuilder::from_env()
        .with_bucket_name(bucket)
        .with_http_connector(Direct)
        .with_retry(retries())
        .build()
        .map_err(|error| settings(&error))
}

fn azure(container: &str) -> Result<object_store::azure::MicrosoftAzure, StorageError> {
    MicrosoftAzureBuilder::from_env()
        .with_container_name(container)
        .with_http_connector(Direct)
        .with_retry(retries())
        .build()
        .map_err(|error| settings(&error))
}

fn folder(url: &Url) -> Result<Arc<dyn ObjectStore>, StorageError> {
    let path = url.to_file_path().map_err(|()| StorageError::Url)?;
    std::fs::create_dir_all(&path).map_err(StorageError::Folder)?;
    let store = LocalFileSystem::new_with_prefix(&path).map_err(|error| settings(&error))?;
    Ok(Arc::new(store))
}

fn settings(error: &object_store::Error) -> StorageError {
    StorageError::Settings(super::redacted(error))
}

/// A few quick retries here; longer trouble is a job's own retry.
fn retries() -> RetryConfig {
    RetryConfig {
        max_retries: 2,
        retry_timeout: Duration::from_secs(20),
        ..RetryConfig::default()
    }
}

/// Connects straight to the store: the operator's own host, so without the egress guard, and without a proxy, whatever
/// the environment says.
#[derive(Debug)]
struct Direct;

impl HttpConnector for Direct {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let allow_http = options.get_config_value(&ClientConfigKey::AllowHttp);
        let client = reqwest::Client::builder()
            .no_proxy()
            .https_only(allow_http.as_deref() != Some("true"))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .user_agent(concat!("postroom/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| object_store::Error::Generic {
                store: "http",
                source: error.into(),
            })?;
        Ok(HttpClient::new(client))
    }
}
