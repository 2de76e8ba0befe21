use super::*;

fn route(method: &str, path: &str) -> Route {
    Route { method: method.to_owned(), path: path.to_owned() }
}

fn request(builder: http::request::Builder, body: &'static [u8]) -> Request<Bytes> {
    builder.body(Bytes::from_static(body)).unwrap()
}

fn event_of(request: &Request<Bytes>) -> Value {
    let route = route("ANY", "/functions/v1/webhook-intake/{proxy+}");
    let parameters = path_parameters(&route, request).unwrap();
    event(request, [203, 0, 113, 9].into(), &route, parameters, "id")
}

#[test]
fn an_event_keeps_path_and_query_as_they_were_sent() {
    let sent = Request::post("/functions/v1/webhook-intake/plivo/a%2Fb%20c?b=2&a=1&b=3&c=%2B+")
        .header("Host", "api.example.com:8443")
        .header("User-Agent", "Plivo")
        .header("X-Two", "1")
        .header("X-Two", "2")
        .header("Cookie", "a=1; b=2")
        .header("Cookie", "c=3");
    let event = event_of(&request(sent, b""));
    assert_eq!(event["version"], "2.0");
    assert_eq!(event["routeKey"], "ANY /functions/v1/webhook-intake/{proxy+}");
    assert_eq!(event["rawPath"], "/functions/v1/webhook-intake/plivo/a%2Fb%20c");
    assert_eq!(event["rawQueryString"], "b=2&a=1&b=3&c=%2B+");
    assert_eq!(event["queryStringParameters"], json!({ "a": "1", "b": "2,3", "c": "+ " }));
    assert_eq!(event["pathParameters"], json!({ "proxy": "plivo/a/b c" }));
    assert_eq!(event["headers"]["x-two"], "1,2");
    assert_eq!(event["headers"]["x-forwarded-for"], "203.0.113.9");
    assert_eq!(event["headers"]["x-forwarded-port"], "8443");
    assert_eq!(event["headers"].get("cookie"), None);
    assert_eq!(event["cookies"], json!(["a=1", "b=2", "c=3"]));
    let http = &event["requestContext"]["http"];
    assert_eq!((http["method"].as_str(), http["sourceIp"].as_str()), (Some("POST"), Some("203.0.113.9")));
    assert_eq!((http["protocol"].as_str(), http["userAgent"].as_str()), (Some("HTTP/1.1"), Some("Plivo")));
    assert_eq!(event["requestContext"]["stage"], "$default");
    assert_eq!(event["requestContext"]["domainName"], "api.example.com:8443");
    assert_eq!((event.get("body"), &event["isBase64Encoded"]), (None, &json!(false)));
}

#[test]
fn only_texts_go_as_text_and_forms_are_base64() {
    for (kind, text) in [
        (Some("application/json; charset=utf-8"), true),
        (Some("text/xml"), true),
        (Some("Application/JSON"), true),
        (Some("application/x-www-form-urlencoded"), false),
        (Some("application/octet-stream"), false),
        (None, false),
    ] {
        let mut sent = Request::post("/functions/v1/webhook-intake/x");
        if let Some(kind) = kind {
            sent = sent.header(CONTENT_TYPE, kind);
        }
        let event = event_of(&request(sent, b"a=1"));
        assert_eq!(event["isBase64Encoded"], !text, "{kind:?}");
        assert_eq!(event["body"], if text { "a=1" } else { "YT0x" }, "{kind:?}");
    }
    let no_utf8 = Request::post("/functions/v1/webhook-intake/x").header(CONTENT_TYPE, "application/json");
    assert_eq!(event_of(&request(no_utf8, b"\xff"))["isBase64Encoded"], true);
}

#[test]
fn a_route_matches_by_method_and_segments() {
    let get = |path: &str| Request::get(path).body(Bytes::new()).unwrap();
    let proxy = route("ANY", "/functions/v1/a/{proxy+}");
    assert!(path_parameters(&proxy, &get("/functions/v1/a/x/y")).is_some());
    for other in ["/functions/v1/a/", "/functions/v1/a", "/functions/v1/ab/x", "/"] {
        assert!(path_parameters(&proxy, &get(other)).is_none(), "{other}");
    }
    let one = route("GET", "/invoices/{id}");
    assert_eq!(path_parameters(&one, &get("/invoices/7")).unwrap()["id"], "7");
    assert!(path_parameters(&one, &get("/invoices/7/pdf")).is_none());
    assert!(path_parameters(&route("POST", "/invoices/{id}"), &get("/invoices/7")).is_none());
}

#[test]
fn an_answer_s_status_headers_cookies_and_body_are_taken_over() {
    let answer = json!({
        "statusCode": 201,
        "headers": { "Content-Type": "application/xml", "x-count": 3, "content-length": "99", "x-many": "lost" },
        "multiValueHeaders": { "x-many": ["a", "b"] },
        "cookies": ["s=1; Path=/", "t=2"],
        "isBase64Encoded": true,
        "body": "PGEvPg==",
    });
    let made = response(answer.to_string().as_bytes()).unwrap();
    assert_eq!(made.status(), StatusCode::CREATED);
    assert_eq!(made.headers()[CONTENT_TYPE], "application/xml");
    assert_eq!(made.headers()["x-count"], "3");
    assert!(!made.headers().contains_key(CONTENT_LENGTH));
    assert_eq!(made.headers().get_all("x-many").iter().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(made.headers().get_all(SET_COOKIE).iter().collect::<Vec<_>>(), ["s=1; Path=/", "t=2"]);
    assert_eq!(&made.body()[..], b"<a/>");
}

#[test]
fn json_without_a_status_is_the_body_of_a_200_and_nonsense_is_no_response() {
    for text in [r#"{"ok":true}"#, r#""hello""#, "null", "[1]"] {
        let made = response(text.as_bytes()).unwrap();
        assert_eq!((made.status(), &made.body()[..]), (StatusCode::OK, text.as_bytes()));
        assert_eq!(made.headers()[CONTENT_TYPE], "application/json");
    }
    let defaults = response(br#"{"statusCode":"204"}"#).unwrap();
    assert_eq!((defaults.status(), defaults.body().len()), (StatusCode::NO_CONTENT, 0));
    for wrong in ["{", r#"{"statusCode":"x"}"#, r#"{"statusCode":99999}"#, r#"{"statusCode":200,"body":{}}"#] {
        assert!(response(wrong.as_bytes()).is_none(), "{wrong}");
    }
}
