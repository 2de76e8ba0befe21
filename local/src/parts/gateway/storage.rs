//! Supabase Storage on disk: as much of it as the functions and a listener's browser use.
//!
//! Only the service may put, read and delete; everybody may follow a link that it signed. Errors have Storage's own shape, status 400
//! included.

use super::{Shared, allow_any_origin, answer, no_route, take_api_key};
use anyhow::{Context, Result, bail};
use axum::{
    Router,
    body::Body,
    extract::{Path as UrlPath, Query, State},
    response::{IntoResponse, Response},
    routing::{delete, post},
};
use chrono::Utc;
use futures::StreamExt;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::io::AsyncWriteExt;
use uuid::Uuid;

/// The objects of one run.
pub(super) struct Objects {
    folder: PathBuf,
    key: [u8; 32],
}

/// What a signed link says.
#[derive(Serialize, Deserialize)]
struct Link {
    url: String,
    exp: i64,
}

impl Objects {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder, key: rand::rng().random() }
    }

    /// Where an object is; `None` for what is no path below a bucket.
    fn file(&self, bucket: &str, path: &str) -> Option<PathBuf> {
        let plain = |segment: &str| !matches!(segment, "" | "." | "..") && !segment.contains(['\\', '\0']);
        (plain(bucket) && !bucket.contains('/') && path.split('/').all(plain))
            .then(|| self.folder.join("objects").join(bucket).join(path))
    }

    /// Where its media type is.
    fn type_file(&self, object: &Path) -> PathBuf {
        let below = object.strip_prefix(self.folder.join("objects")).unwrap_or(object);
        self.folder.join("types").join(below)
    }

    async fn put(&self, file: &Path, content_type: &str, body: Body) -> Result<()> {
        let types = self.type_file(file);
        for folder in [file.parent(), types.parent()].into_iter().flatten() {
            fs::create_dir_all(folder)?;
        }
        // Whole or not at all: what breaks off has never been there.
        let scratch = self.folder.join(format!("upload-{}", Uuid::new_v4().simple()));
        let written = write(&scratch, body).await;
        if let Err(error) = written {
            let _gone = fs::remove_file(&scratch);
            return Err(error);
        }
        fs::write(types, content_type)?;
        fs::rename(&scratch, file).context("an object cannot be put in its place")
    }

    fn sign(&self, url: String, seconds: i64) -> Result<String> {
        let link = Link { url, exp: Utc::now().timestamp() + seconds };
        Ok(jsonwebtoken::encode(&Header::new(Algorithm::HS256), &link, &EncodingKey::from_secret(&self.key))?)
    }

    fn opens(&self, token: &str, url: &str) -> bool {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.leeway = 0;
        jsonwebtoken::decode::<Link>(token, &DecodingKey::from_secret(&self.key), &validation)
            .is_ok_and(|link| link.claims.url == url)
    }
}

async fn write(scratch: &Path, body: Body) -> Result<()> {
    let mut file = tokio::fs::File::create(scratch).await?;
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let Ok(piece) = piece else { bail!("the upload broke off") };
        file.write_all(&piece).await?;
    }
    Ok(file.flush().await?)
}

pub(super) fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/storage/v1/object/sign/{bucket}/{*path}", post(sign).get(signed))
        .route("/storage/v1/object/{bucket}", delete(remove_many))
        .route("/storage/v1/object/{bucket}/{*path}", post(upload).put(upload).get(download).delete(remove_one))
        .layer(axum::extract::DefaultBodyLimit::disable())
}

/// An error as Storage writes it.
fn error(status: u16, name: &str, message: &str) -> Response {
    answer(StatusCode::BAD_REQUEST, json!({ "statusCode": status.to_string(), "error": name, "message": message }))
}

fn not_found() -> Response {
    error(404, "not_found", "Object not found")
}

/// The objects and the file that is asked for, when the service asks.
async fn open<'a>(
    shared: &'a Shared,
    headers: &HeaderMap,
    bucket: &str,
    path: &str,
) -> Result<(&'a Objects, PathBuf), Response> {
    let Some(objects) = &shared.objects else { return Err(no_route().await) };
    match shared.access.is_service(headers, take_api_key(headers, None).0.as_deref()) {
        Ok(true) => {}
        Ok(false) => return Err(error(403, "Unauthorized", "new row violates row-level security policy")),
        Err(refusal) => return Err(refusal.into_response()),
    }
    match objects.file(bucket, path) {
        Some(file) => Ok((objects, file)),
        None => Err(error(400, "InvalidKey", "Invalid key")),
    }
}

async fn upload(
    State(shared): State<Arc<Shared>>,
    UrlPath((bucket, path)): UrlPath<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let (objects, file) = match open(&shared, &headers, &bucket, &path).await {
        Ok(opened) => opened,
        Err(response) => return response,
    };
    if file.exists() && headers.get("x-upsert").is_none_or(|value| value != "true") {
        return error(409, "Duplicate", "The resource already exists");
    }
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    match objects.put(&file, content_type.unwrap_or("application/octet-stream"), body).await {
        Ok(()) => answer(StatusCode::OK, json!({ "Key": format!("{bucket}/{path}"), "Id": Uuid::new_v4() })),
        Err(problem) => {
            tracing::warn!(error = %problem, "an upload failed");
            error(500, "Internal", "The upload failed")
        }
    }
}

async fn download(
    State(shared): State<Arc<Shared>>,
    UrlPath((bucket, path)): UrlPath<(String, String)>,
    headers: HeaderMap,
) -> Response {
    match open(&shared, &headers, &bucket, &path).await {
        Ok((objects, file)) => send(objects, &file).await,
        Err(response) => response,
    }
}

async fn send(objects: &Objects, file: &Path) -> Response {
    let Ok(bytes) = tokio::fs::read(file).await else { return not_found() };
    let told = tokio::fs::read_to_string(objects.type_file(file)).await.unwrap_or_default();
    let mut response = bytes.into_response();
    let content_type = HeaderValue::from_str(&told);
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, content_type.unwrap_or(HeaderValue::from_static("application/octet-stream")));
    allow_any_origin(response.headers_mut());
    response
}

async fn sign(
    State(shared): State<Arc<Shared>>,
    UrlPath((bucket, path)): UrlPath<(String, String)>,
    headers: HeaderMap,
    axum::Json(asked): axum::Json<Value>,
) -> Response {
    let (objects, file) = match open(&shared, &headers, &bucket, &path).await {
        Ok(opened) => opened,
        Err(response) => return response,
    };
    if !file.is_file() {
        return not_found();
    }
    let seconds = asked["expiresIn"].as_i64().filter(|seconds| *seconds > 0);
    let url = format!("{bucket}/{path}");
    match seconds.map(|seconds| objects.sign(url.clone(), seconds)) {
        Some(Ok(token)) => answer(StatusCode::OK, json!({ "signedURL": format!("/object/sign/{url}?token={token}") })),
        _ => error(400, "Error", "body must have required property 'expiresIn'"),
    }
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: String,
}

async fn signed(
    State(shared): State<Arc<Shared>>,
    UrlPath((bucket, path)): UrlPath<(String, String)>,
    Query(Token { token }): Query<Token>,
) -> Response {
    let Some(objects) = &shared.objects else { return no_route().await };
    match objects.file(&bucket, &path) {
        Some(file) if objects.opens(&token, &format!("{bucket}/{path}")) => send(objects, &file).await,
        _ => error(400, "InvalidJWT", "jwt expired or not valid"),
    }
}

async fn remove_one(
    State(shared): State<Arc<Shared>>,
    UrlPath((bucket, path)): UrlPath<(String, String)>,
    headers: HeaderMap,
) -> Response {
    match open(&shared, &headers, &bucket, &path).await {
        Ok((_, file)) if fs::remove_file(&file).is_ok() => {
            answer(StatusCode::OK, json!({ "message": "Successfully deleted" }))
        }
        Ok(_) => not_found(),
        Err(response) => response,
    }
}

async fn remove_many(
    State(shared): State<Arc<Shared>>,
    UrlPath(bucket): UrlPath<String>,
    headers: HeaderMap,
    axum::Json(asked): axum::Json<Value>,
) -> Response {
    let mut gone = Vec::new();
    for path in asked["prefixes"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        match open(&shared, &headers, &bucket, path).await {
            Ok((_, file)) if fs::remove_file(&file).is_ok() => gone.push(json!({ "bucket_id": bucket, "name": path })),
            Ok(_) => {}
            Err(response) => return response,
        }
    }
    answer(StatusCode::OK, json!(gone))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_stays_below_its_bucket() {
        let objects = Objects::new(PathBuf::from("/run"));
        assert_eq!(objects.file("recordings", "o/a.mp3"), Some(PathBuf::from("/run/objects/recordings/o/a.mp3")));
        for (bucket, path) in
            [("recordings", "../x"), ("recordings", "a//b"), ("..", "x"), ("a/b", "x"), ("recordings", "")]
        {
            assert_eq!(objects.file(bucket, path), None, "{bucket} {path}");
        }
    }

    #[test]
    fn a_link_opens_one_object_until_it_ends() {
        let objects = Objects::new(PathBuf::from("/run"));
        let token = objects.sign("recordings/a".to_owned(), 60).unwrap();
        assert!(objects.opens(&token, "recordings/a"));
        assert!(!objects.opens(&token, "recordings/b"));
        assert!(!objects.opens(&objects.sign("recordings/a".to_owned(), -60).unwrap(), "recordings/a"));
        assert!(!Objects::new(PathBuf::from("/run")).opens(&token, "recordings/a"), "another run's key");
    }
}
