use super::*;
use reqwest::dns::{Addrs, Name, Resolving};
use std::{
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const PATIENCE: Duration = Duration::from_millis(500);

/// Answers with one address after the other, as a server that rebinds a name does.
struct Rebinding(Mutex<Vec<Vec<SocketAddr>>>, AtomicUsize);

impl Rebinding {
    fn new(answers: &[&[&str]]) -> Arc<Self> {
        let parse = |list: &&[&str]| list.iter().map(|text| format!("{text}:0").parse().unwrap()).collect();
        Arc::new(Self(Mutex::new(answers.iter().map(parse).collect()), AtomicUsize::new(0)))
    }
}

impl Resolve for Rebinding {
    fn resolve(&self, _: Name) -> Resolving {
        self.1.fetch_add(1, Ordering::SeqCst);
        let mut answers = self.0.lock().unwrap();
        let found = if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() };
        Box::pin(async move { Ok(Box::new(found.into_iter()) as Addrs) })
    }
}

/// A server on loopback that counts who connects, and answers with `answer`.
async fn server(answer: &'static str) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, count) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
    let seen = count.clone();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            seen.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                let _read = socket.read(&mut buffer).await;
                let _written = socket.write_all(answer.as_bytes()).await;
            });
        }
    });
    (port, count)
}

fn letter<'a>(url: &'a str, secrets: &'a [String]) -> Letter<'a> {
    Letter { id: "event", url, body: "{}".to_owned(), secrets }
}

#[tokio::test]
async fn a_name_that_is_rebound_to_this_machine_reaches_nothing() {
    let (port, connected) = server("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    let secrets = [SECRET.to_owned()];
    // The second answer is what a check-then-connect would connect to; 192.0.2.0/24 stands for any other that is not public.
    for answers in [
        &[&["127.0.0.1"][..]][..],
        &[&["93.184.215.14", "127.0.0.1"]],
        &[&["[::1]"]],
        &[&["[::ffff:127.0.0.1]"]],
        &[&["192.0.2.1"], &["127.0.0.1"]],
        &[&["169.254.169.254"]],
    ] {
        let resolver = Rebinding::new(answers);
        let sender = Sender::resolving_with(resolver.clone(), PATIENCE, true).unwrap();
        for _ in 0..2 {
            let outcome = sender.send(letter(&format!("https://rebound.example:{port}/"), &secrets)).await;
            assert_eq!(outcome.error.as_deref(), Some(NotPublic.to_string().as_str()), "{answers:?}");
        }
        assert_eq!(resolver.1.load(Ordering::SeqCst), 2, "each attempt asks once, and connects to what it was told");
    }
    assert_eq!(connected.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn what_was_checked_is_what_is_connected_to() {
    let (port, connected) = server("").await;
    // Public when it is checked, this machine ever after: nobody asks again.
    let resolver = Rebinding::new(&[&["240.0.0.1"], &["127.0.0.1"]]);
    let checked = PublicOnly(Rebinding::new(&[&["93.184.215.14"], &["127.0.0.1"]]));
    let found: Vec<_> = checked.resolve("rebound.example".parse().unwrap()).await.unwrap().collect();
    assert_eq!(found, ["93.184.215.14:0".parse().unwrap()]);
    assert!(checked.resolve("rebound.example".parse().unwrap()).await.is_err());
    let sender = Sender::resolving_with(resolver, PATIENCE, false).unwrap();
    sender.send(letter(&format!("https://rebound.example:{port}/"), &[SECRET.to_owned()])).await;
    assert_eq!(connected.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_redirect_is_an_answer_and_goes_nowhere() {
    let (target, reached) = server("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    let answer =
        format!("HTTP/1.1 307 Temporary Redirect\r\nlocation: http://127.0.0.1:{target}/\r\ncontent-length: 0\r\n\r\n");
    let (port, _) = server(Box::leak(answer.into_boxed_str())).await;
    let sender = Sender::new(true).unwrap();
    let outcome = sender.send(letter(&format!("http://127.0.0.1:{port}/"), &[SECRET.to_owned()])).await;
    assert_eq!((outcome.status, reached.load(Ordering::SeqCst)), (Some(307), 0));
    let outcome =
        Sender::new(false).unwrap().send(letter(&format!("http://127.0.0.1:{port}/"), &[SECRET.to_owned()])).await;
    assert_eq!(outcome.status, None, "{outcome:?}");
}

#[tokio::test]
async fn an_answer_without_an_end_is_read_to_a_limit() {
    let head = "HTTP/1.1 503 Busy\r\nretry-after: 120\r\ncontent-length: 100000000\r\n\r\n";
    let answer = format!("{head}{}", "x".repeat(100_000));
    let (port, _) = server(Box::leak(answer.into_boxed_str())).await;
    let outcome =
        Sender::new(true).unwrap().send(letter(&format!("http://127.0.0.1:{port}/"), &[SECRET.to_owned()])).await;
    assert_eq!((outcome.status, outcome.retry_after_seconds), (Some(503), Some(120)));
    assert_eq!(outcome.body.map(|body| body.len()), Some(KEPT));
}

#[tokio::test]
async fn whoever_says_nothing_is_not_waited_for_longer_than_is_told() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let sender = Sender::resolving_with(Arc::new(System), PATIENCE, true).unwrap();
    let outcome = sender.send(letter(&url, &[SECRET.to_owned()])).await;
    assert_eq!(outcome.error.as_deref(), Some("the endpoint did not answer in time"));
}

#[test]
fn retry_after_is_a_number_or_a_date() {
    let read = |text: &str| {
        let mut headers = HeaderMap::new();
        headers.insert(header::RETRY_AFTER, text.parse().unwrap());
        retry_after(&headers)
    };
    assert_eq!(read("7"), Some(7));
    assert_eq!(read("18446744073709551615"), Some(DAY_SECONDS));
    let later = (chrono::Utc::now() + chrono::TimeDelta::seconds(100)).to_rfc2822();
    assert!(read(&later).is_some_and(|seconds| (90..=100).contains(&seconds)));
    for junk in ["-1", "soon", "Wed, 21 Oct 2015 07:28:00 GMT"] {
        assert_eq!(read(junk), None, "{junk}");
    }
}
