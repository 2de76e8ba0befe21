//! The parts one by one and in pairs, the real ones: what they promise to those who build on them.

use anyhow::Result;
use http::{StatusCode, header};
use local::parts::{
    folder::RunFolder,
    gateway::{FunctionRequest, Listening},
    install,
    keys::Keys,
    postgres::{Postgres, PostgresOptions, Role, Server},
    postgrest::{Postgrest, PostgrestOptions},
    progress::Progress,
    sqs::Sqs,
    template::Template,
};
use serde_json::{Value, json};
use std::sync::Arc;
use uuid::Uuid;

/// A table with row level security and a function of each kind.
const SCHEMA: &str = "
    create table public.notes (id int primary key, owner uuid not null default auth.uid());
    alter table public.notes enable row level security;
    revoke all on public.notes from anon, authenticated, service_role;
    grant select, insert on public.notes to authenticated, service_role;
    create policy own on public.notes to authenticated using (owner = (select auth.uid())) with check (owner = (select auth.uid()));
    create function public.whoami() returns text language sql stable set search_path = '' as 'select current_user::text';
    create function public.slow() returns void language sql set search_path = '' as 'select pg_catalog.pg_sleep(20)';
";

struct Api {
    origin: String,
    keys: Keys,
    http: reqwest::Client,
    postgrest: Postgrest,
    postgres: Postgres,
    _gateway: local::parts::gateway::Gateway,
    _run: RunFolder,
}

async fn api() -> Result<Api> {
    let progress = Progress::hidden();
    let run = RunFolder::create()?;
    let server = Server::find(&progress).await?;
    let postgres = Postgres::start(&server, &run, run.path(), &PostgresOptions::default()).await?;
    postgres.connect(Role::Owner, "postgres").await?.batch_execute(SCHEMA).await?;
    let listening = Listening::bind(None).await?;
    let origin = listening.origin_text();
    let keys = Keys::generate(&origin)?;
    let options = PostgrestOptions {
        binary: install::postgrest(&progress).await?,
        database_url: postgres.url(Role::Authenticator, "postgres"),
        pool: 4,
    };
    let postgrest = Postgrest::start(&options, &keys, run.path(), run.path()).await?;
    let echo = Arc::new(|FunctionRequest { function, request, source_ip }: FunctionRequest| {
        let body = json!({
            "function": function,
            "uri": request.uri().to_string(),
            "bytes": request.body().len(),
            "from": source_ip,
        });
        Box::pin(async move { axum::response::IntoResponse::into_response(axum::Json(body)) })
            as futures::future::BoxFuture<_>
    });
    let gateway = listening.serve(keys.clone(), postgrest.url.clone(), Some(echo))?;
    Ok(Api { origin, keys, http: local::parts::http_client()?, postgrest, postgres, _gateway: gateway, _run: run })
}

impl Api {
    async fn whoami(&self, headers: &[(&str, &str)]) -> Result<(StatusCode, Value)> {
        let request = headers
            .iter()
            .fold(self.http.post(format!("{}/rest/v1/rpc/whoami", self.origin)), |request, (name, value)| {
                request.header(*name, *value)
            });
        let response = request.json(&json!({})).send().await?;
        Ok((response.status(), response.json().await?))
    }
}

#[tokio::test]
async fn the_gateway_and_postgrest_know_everyone_by_key_and_token() {
    let api = api().await.unwrap();
    let (publishable, secret) = (api.keys.publishable_key.as_str(), api.keys.secret_key.as_str());
    let user = Uuid::new_v4();
    let jwt = api.keys.user_jwt(user, "a@example.com").unwrap();
    let bearer = format!("Bearer {jwt}");

    assert_eq!(api.whoami(&[("apikey", publishable)]).await.unwrap(), (StatusCode::OK, json!("anon")));
    assert_eq!(api.whoami(&[("apikey", secret)]).await.unwrap(), (StatusCode::OK, json!("service_role")));
    assert_eq!(
        api.whoami(&[("apikey", publishable), ("authorization", &bearer)]).await.unwrap(),
        (StatusCode::OK, json!("authenticated"))
    );
    assert_eq!(api.whoami(&[]).await.unwrap().0, StatusCode::UNAUTHORIZED);
    assert_eq!(api.whoami(&[("apikey", "sb_publishable_unknown")]).await.unwrap().0, StatusCode::UNAUTHORIZED);
    assert_eq!(
        api.whoami(&[("apikey", secret), ("user-agent", "Mozilla/5.0")]).await.unwrap().0,
        StatusCode::UNAUTHORIZED
    );

    let mut expired = api.keys.user_claims(user, "a@example.com");
    expired.exp = expired.iat - 60;
    let expired = format!("Bearer {}", api.keys.sign(&expired).unwrap());
    let (status, body) = api.whoami(&[("apikey", publishable), ("authorization", &expired)]).await.unwrap();
    assert_eq!((status, body["message"].as_str()), (StatusCode::UNAUTHORIZED, Some("JWT expired")));
    let strange = format!("Bearer {}", Keys::generate(&api.origin).unwrap().user_jwt(user, "a@example.com").unwrap());
    assert_eq!(
        api.whoami(&[("apikey", publishable), ("authorization", &strange)]).await.unwrap().0,
        StatusCode::UNAUTHORIZED
    );
    let mut other_audience = api.keys.user_claims(user, "a@example.com");
    other_audience.aud = Some("elsewhere".to_owned());
    let other_audience = format!("Bearer {}", api.keys.sign(&other_audience).unwrap());
    assert_eq!(
        api.whoami(&[("apikey", publishable), ("authorization", &other_audience)]).await.unwrap().0,
        StatusCode::UNAUTHORIZED
    );

    // Row level security goes by the token, query parameters and bodies go through, and the answer's headers come back.
    let notes = format!("{}/rest/v1/notes", api.origin);
    let made =
        api.http.post(&notes).header("apikey", publishable).bearer_auth(&jwt).header("prefer", "return=representation");
    let made: Value = made.json(&json!([{ "id": 1 }, { "id": 2 }])).send().await.unwrap().json().await.unwrap();
    assert_eq!(made[0]["owner"], user.to_string());
    let one = api
        .http
        .get(format!("{notes}?id=eq.2&select=id&apikey={publishable}"))
        .bearer_auth(&jwt)
        .header("prefer", "count=exact");
    let one = one.send().await.unwrap();
    assert_eq!(one.headers()[header::CONTENT_RANGE], "0-0/1");
    assert_eq!(one.headers()[header::ACCESS_CONTROL_ALLOW_ORIGIN], "*");
    assert_eq!(one.json::<Value>().await.unwrap(), json!([{ "id": 2 }]));
    let others = api.keys.user_jwt(Uuid::new_v4(), "b@example.com").unwrap();
    let others = api.http.get(&notes).header("apikey", publishable).bearer_auth(others).send().await.unwrap();
    assert_eq!(others.json::<Value>().await.unwrap(), json!([]));
    let anon = api.http.get(&notes).header("apikey", publishable).send().await.unwrap();
    assert_eq!(anon.status(), StatusCode::UNAUTHORIZED);

    // A browser asks first.
    let preflight = api
        .http
        .request(http::Method::OPTIONS, &notes)
        .header("origin", "https://app.example.com")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,apikey,content-type");
    let preflight = preflight.send().await.unwrap();
    assert_eq!(preflight.status(), StatusCode::OK);
    assert_eq!(preflight.headers()[header::ACCESS_CONTROL_ALLOW_HEADERS], "authorization,apikey,content-type");

    // Functions get what was sent, keys or no keys.
    let echoed =
        api.http.post(format!("{}/functions/v1/webhook-intake/plivo/ring/a%20b?x=1&x=2", api.origin)).body("hello");
    let echoed: Value = echoed.send().await.unwrap().json().await.unwrap();
    assert_eq!(
        echoed,
        json!({
            "function": "webhook-intake", "uri": "/functions/v1/webhook-intake/plivo/ring/a%20b?x=1&x=2", "bytes": 5, "from": "127.0.0.1"
        })
    );

    // Supabase's limits hold, and PostgREST can go and come back.
    let slow =
        api.http.post(format!("{}/rest/v1/rpc/slow", api.origin)).header("apikey", publishable).send().await.unwrap();
    assert_eq!(slow.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(slow.json::<Value>().await.unwrap()["code"], "57014");
    api.postgrest.kill().await.unwrap();
    let (status, body) = api.whoami(&[("apikey", secret)]).await.unwrap();
    assert_eq!((status, body["code"].as_str()), (StatusCode::SERVICE_UNAVAILABLE, Some("database_unavailable")));
    api.postgrest.restart().await.unwrap();
    assert_eq!(api.whoami(&[("apikey", secret)]).await.unwrap().0, StatusCode::OK);

    api.postgrest.stop().await.unwrap();
    api.postgres.stop().await.unwrap();
}

#[tokio::test]
async fn a_clone_has_all_that_supabase_adds_and_survives_a_crash() {
    let run = RunFolder::create().unwrap();
    let server = Server::find(&Progress::hidden()).await.unwrap();
    let options = PostgresOptions { durable: true, ..PostgresOptions::default() };
    let postgres = Postgres::start(&server, &run, run.path(), &options).await.unwrap();
    postgres.connect(Role::Owner, "postgres").await.unwrap().batch_execute(SCHEMA).await.unwrap();
    postgres.clone_database("postgres", "clone").await.unwrap();
    let owner = postgres.connect(Role::Owner, "clone").await.unwrap();
    owner
        .batch_execute(
            "insert into public.notes values (1, gen_random_uuid()); select net.http_post('http://127.0.0.1/x')",
        )
        .await
        .unwrap();
    let granted: bool =
        owner.query_one("select has_table_privilege('anon', 'public.notes', 'select')", &[]).await.unwrap().get(0);
    assert!(!granted);
    assert!(owner.batch_execute("create role another superuser").await.is_err());
    drop(owner);

    postgres.crash_and_restart().await.unwrap();
    let admin = postgres.connect(Role::Admin, "clone").await.unwrap();
    let kept: i64 = admin.query_one("select count(*) from public.notes", &[]).await.unwrap().get(0);
    let queued: i64 = admin.query_one("select count(*) from net.http_request_queue", &[]).await.unwrap().get(0);
    assert_eq!((kept, queued), (1, 0), "what is logged is kept, the queue of pg_net is not");
    drop(admin);
    postgres.drop_database("clone").await.unwrap();
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn queues_are_as_the_template_says_and_the_secret_can_be_read() {
    let run = RunFolder::create().unwrap();
    let installed = install::ministack(&Progress::hidden()).await.unwrap();
    let sqs = Sqs::start(&installed, run.path(), run.path()).await.unwrap();
    let template = Template::load(&local::parts::folder::workspace().unwrap().join("template.yaml")).unwrap();
    let urls = sqs.create_queues(&template).await.unwrap();
    let client = sqs.client();
    for queue in &template.queues {
        let attributes = client
            .get_queue_attributes()
            .queue_url(&urls[&queue.logical_id])
            .attribute_names("All".into())
            .send()
            .await
            .unwrap();
        let attributes = attributes.attributes.unwrap();
        assert_eq!(attributes[&"VisibilityTimeout".into()], queue.visibility_timeout.as_secs().to_string());
        assert_eq!(attributes.contains_key(&"RedrivePolicy".into()), queue.redrive.is_some());
    }
    let arn = sqs.create_secret("stack", r#"{"a":1}"#).await.unwrap();
    assert!(arn.starts_with("arn:aws:secretsmanager:us-east-1:"), "{arn}");
    sqs.stop().await.unwrap();
}
