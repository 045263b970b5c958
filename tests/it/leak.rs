//! The secret is in nothing that is printed: no `Debug`, no `Display`, no error and its causes, no event, no metric, no
//! readiness body.
//!
//! One story, from malformed keys to a dead runtime, in which everything public is printed as it goes by; in the end
//! all of it is searched for the secrets, and for every six characters of them.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    error::Error,
    ffi::OsString,
    fmt::{Debug, Display},
    fs, io,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::support::{Entry, Events, Metrics};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::Full;
use tower::{Layer as _, Service as _, ServiceExt as _, service_fn};
use tower_fal::{
    Credential, CredentialStore, FalAuthError, FalAuthLayer, FalClient, FalLayer, FalRetryLayer, SourceError,
    auth::Stamp,
    credential::CredentialError,
    error::{BoxError, Refusal, report},
    origin::{BoundOrigin, EveryRequest, FalOrigins},
    retry::{ReplayBody, Transient},
    source::{self, BoxSource, ChainSource, CredentialSource, DotenvSource, EnvSource, FileSource},
    store::{ReloadError, Snapshot, Status},
};

const SECRET: &str = "q7RtzLw9Xv-2KpYdBn_hJ5mGc0sVfEaU";
const NEXT: &str = "Zx4NfWk8_TbQ1uHyDo6PrMi-3gCvSjLe";

#[test]
fn the_secret_is_in_nothing_that_is_printed() {
    let events = Events::default();
    let dispatch = events.dispatch();
    let _on_this_thread = tracing::dispatcher::set_default(&dispatch);
    // Files are read on other threads, which print as well.
    let on_thread_start = move || std::mem::forget(tracing::dispatcher::set_default(&dispatch));
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().start_paused(true).on_thread_start(on_thread_start.clone()).build().unwrap()
    };

    let metrics = Metrics::new();
    let _recorder_of_this_thread = metrics::set_default_local_recorder(metrics.recorder());

    let mut printed = Printed::default();
    malformed_values(&mut printed);
    origins(&mut printed);
    let first = runtime();
    let survivor = first.block_on(async {
        malformed_environment(&mut printed).await;
        requests(&mut printed).await;
        refusals(&mut printed).await;
        a_source_in_trouble(&mut printed).await;
        halves_lines_and_chains(&mut printed).await;
        a_file_in_trouble(&mut printed).await
    });
    drop(first);
    printed.store(&survivor);
    runtime().block_on(async {
        let gone = survivor.reload().await.unwrap_err();
        assert!(matches!(gone, ReloadError::DriverGone));
        printed.error(&gone);
    });

    // What is not printed cannot leak: these are the events whose absence would make the search worthless.
    let events = events.take();
    for message in [
        "the fal credential was rotated",
        "could not load the fal credential",
        "answers again",
        "has ended",
        "is writable by everyone",
        "fal refused a request",
        "was replayed with another fal credential",
        "shadows a file",
    ] {
        assert!(events.iter().any(|event| event.message.contains(message)), "no event says `{message}`");
    }
    // Whoever reads one of these alone knows which key it is about, and from where.
    for message in ["was rotated", "could not load", "answers again", "shadows a file"] {
        let mut told = events.iter().filter(|event| event.message.contains(message));
        let named = |event: &Entry| ["source", "key_id"].iter().all(|field| event.fields.contains_key(*field));
        assert!(told.any(named), "`{message}` names no key");
    }
    let events: Vec<_> = events.iter().map(ToString::to_string).collect();
    let counters = metrics.counters().into_iter().map(|(series, count)| format!("{series} {count}"));
    let gauges = metrics.gauges().into_iter().map(|(series, value)| format!("{series} {value}"));
    let metrics: Vec<_> = counters.chain(gauges).collect();
    for series in [
        "tower_fal_credential_info key_id=leak-id store=leak-store ",
        "tower_fal_credential_loaded_timestamp_seconds store=leak-store ",
        "tower_fal_reloads_total result=failed store=leak-store ",
        "tower_fal_refusals_total action=refused reason=account_locked status=403 store=",
        "tower_fal_replays_total result=refused ",
    ] {
        assert!(metrics.iter().any(|line| line.starts_with(series)), "no metric is called `{series}`: {metrics:#?}");
    }
    assert!(printed.texts.len() > 100);
    for text in printed.texts.iter().chain(&events).chain(&metrics) {
        assert_eq!(find_secret(text), None, "in: {text}");
    }
}

#[test]
fn control_the_search_finds_a_part_of_a_secret_in_every_guise() {
    let bytes = &SECRET.as_bytes()[8..20];
    for text in [
        format!("Key id:{SECRET}"),
        format!("it starts with {}...", &SECRET[..6]),
        format!("...{}", &NEXT[NEXT.len() - 6..]),
        format!("{bytes:?}"),
        format!("{bytes:#?}"),
        format!("{bytes:02x?}"),
        bytes.iter().map(|byte| format!("{byte:02X}")).collect(),
    ] {
        assert!(find_secret(&text).is_some(), "{text}");
    }
    assert_eq!(find_secret("Credential { scheme: Key, key_id: \"leak-id\" }"), None);
}

fn malformed_values(printed: &mut Printed) {
    let mut hints = BTreeSet::new();
    let mut refused = |error: CredentialError| {
        hints.insert(error.to_string());
        printed.error(&error);
        printed.debug(&error.position());
        printed.error(&SourceError::new("mine", error));
    };
    for value in malformed() {
        refused(Credential::key(&value).unwrap_err());
        // Some of them are good halves or tokens.
        let otherwise = [Credential::key_pair("leak-id", &value), Credential::bearer(&value)];
        otherwise.into_iter().filter_map(Result::err).for_each(&mut refused);
    }
    refused(Credential::key_pair("leak-id", format!("leak-id:{SECRET}")).unwrap_err());
    refused(Credential::key_pair(format!("leak-id:{SECRET}"), SECRET).unwrap_err());
    refused(Credential::key_pair("", SECRET).unwrap_err());
    refused(Credential::key_pair("leak-id", " ").unwrap_err());
    for hint in [
        "is empty",
        "is longer than 16384 bytes",
        "key id is longer than 256 bytes",
        "a line break",
        "a blank",
        "a control character",
        "a byte outside ASCII",
        "UTF-16",
        "`Key `",
        "`Bearer `",
        "a quote",
        "`FAL_KEY=`",
        "has no `:`",
        "nothing before its `:`",
        "nothing behind its `:`",
        "holds a `:`",
        "the whole key",
    ] {
        assert!(hints.iter().any(|text| text.contains(hint)), "nothing was refused with `{hint}`");
    }

    // Not malformed, but not what was hoped for either.
    let claims = [format!(r#"{{"exp":"{SECRET}"}}"#), format!(r#"{{"sub":"{SECRET}","exp":4000000000}}"#)];
    for claims in claims {
        use base64::Engine as _;
        let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(claims);
        printed.credential(&Credential::bearer(format!("e30.{claims}.{SECRET}")).unwrap());
    }
    printed.credential(&Credential::bearer(SECRET).unwrap());
    printed.credential(&Credential::key_pair("leak-id", SECRET).unwrap().with_source("noted"));
}

/// Values with a secret in them that are wrong, each in its own way, in a file as well as in a variable.
fn malformed() -> Vec<Vec<u8>> {
    let mut values: Vec<Vec<u8>> = [
        SECRET.to_owned(),
        format!(":{SECRET}"),
        format!("{SECRET}:"),
        format!("leak-id:{}\n{}", &SECRET[..16], &SECRET[16..]),
        format!("leak-id:{SECRET} {NEXT}"),
        format!("leak-id:{SECRET}\0"),
        format!("leak-id:{SECRET}\u{e9}"),
        format!("Key leak-id:{SECRET}"),
        format!("Bearer {SECRET}"),
        format!("\"leak-id:{SECRET}\""),
        format!("FAL_KEY=leak-id:{SECRET}"),
        format!("leak-id:{}", SECRET.repeat(600)),
        format!("{}:{SECRET}", NEXT.repeat(10)),
    ]
    .into_iter()
    .map(String::into_bytes)
    .collect();
    values.push([b"\xFF\xFEleak-id:", SECRET.as_bytes()].concat());
    values.push([b"leak-id:", SECRET.as_bytes(), b"\xC3\x28"].concat());
    values
}

fn origins(printed: &mut Printed) {
    for text in [
        SECRET.to_owned(),
        format!("leak-id:{SECRET}"),
        format!("https://leak-id:{SECRET}@gateway.example.com"),
        format!("https://gateway.example.com/?fal_key={SECRET}"),
        format!("http://{SECRET}.example.com"),
    ] {
        printed.error(&FalOrigins::new().and(&text).unwrap_err());
        printed.error(&BoundOrigin::new(&text).unwrap_err());
        printed.error(&FalAuthLayer::for_origin(fixed(), &text).unwrap_err());
    }
    printed.debug(&FalOrigins::new().backups().subdomains().and("https://gateway.example.com").unwrap());
    printed.debug(&BoundOrigin::new("https://fal.run").unwrap());
    printed.debug(&EveryRequest);
}

async fn malformed_environment(printed: &mut Printed) {
    for value in malformed() {
        let Ok(value) = String::from_utf8(value) else {
            continue;
        };
        let lookup = move |name: &str| match name {
            "FAL_KEY" | "FAL_KEY_SECRET" => Some(OsString::from(&value)),
            "FAL_KEY_ID" => Some("leak-id:".into()),
            _ => None,
        };
        for source in [EnvSource::key(), EnvSource::pair(), EnvSource::all()] {
            let source = source.environment(lookup.clone());
            printed.debug(&source);
            printed.error(&source.load().await.unwrap_err());
            printed.error(&CredentialStore::builder(source).build().await.unwrap_err());
        }
    }
    let half = EnvSource::pair().environment(|name| (name == "FAL_KEY_SECRET").then(|| SECRET.into()));
    printed.error(&half.load().await.unwrap_err());
}

async fn requests(printed: &mut Printed) {
    for layer in [FalAuthLayer::new(fixed()), FalAuthLayer::new(fixed()).keep_existing()] {
        printed.debug(&layer);
        for own in [None, Some(Credential::key(format!("own-id:{NEXT}")).unwrap())] {
            let mut service = layer.layer(service_fn(async |request: Request<()>| {
                Ok::<_, Infallible>(Response::builder().status(StatusCode::UNAUTHORIZED).body(request).unwrap())
            }));
            printed.debug(&service);
            let mut request = Request::get("https://fal.run/a").body(()).unwrap();
            if let Some(own) = own {
                request.extensions_mut().insert(own);
            }
            let response = service.ready().await.unwrap().call(request);
            printed.debug(&response);
            let response = response.await.unwrap();
            printed.debug(&response);
            printed.debug(response.extensions());
            printed.debug(response.extensions().get::<Stamp>().unwrap());
            let request = response.into_body();
            assert!(request.headers().contains_key(AUTHORIZATION));
            printed.debug(&request);
            printed.debug(request.headers());
            printed.debug(&request.headers()[AUTHORIZATION]);
            printed.debug(&request.headers().iter().collect::<Vec<_>>());
            printed.debug(&request.into_parts().0);
        }
    }
    printed.debug(&FalAuthLayer::per_request());
    printed.debug(&FalAuthLayer::for_origin(fixed(), "https://fal.run").unwrap());

    let mut handshake = Request::get("wss://ws.fal.run/a").body(()).unwrap();
    assert!(fixed().authorize(&mut handshake));
    printed.debug(&handshake);
}

/// The retry layer, and a fal that echoes the secret wherever it can.
async fn refusals(printed: &mut Printed) {
    let store = fixed();
    let layer = tower_fal::layer(&store);
    printed.debug(&layer);
    printed.debug(&layer.clone().passthrough());
    printed.debug(&FalLayer::per_request());
    let transient = Transient::default();
    printed.debug(&transient);
    printed.debug(&FalRetryLayer::new(store.clone()).transient(transient));

    let own = Credential::key(format!("own-id:{NEXT}")).unwrap();
    let token = Credential::bearer(NEXT).unwrap();
    for status in [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN] {
        for number in 0..ECHOES {
            for own in [None, Some(own.clone()), Some(token.clone())] {
                let echo = move |request: Request<ReplayBody<Full<Bytes>>>| async move {
                    Ok::<_, Infallible>(echo(status, number, &request))
                };
                let request = |body: &'static str| {
                    let mut request = Request::post("https://fal.run/a").body(Full::<Bytes>::from(body)).unwrap();
                    own.clone().map(|own| request.extensions_mut().insert(own));
                    request
                };
                let mut typed = layer.layer(service_fn(echo));
                printed.debug(&typed);
                let response = typed.ready().await.unwrap().call(request("{}"));
                printed.debug(&response);
                printed.refusal(response.await.unwrap_err());

                let client = FalClient::over(typed);
                printed.debug(&client);
                printed.refusal(client.oneshot(request("{}")).await.unwrap_err());

                let handed_on = layer.clone().passthrough().layer(service_fn(echo));
                let response = handed_on.oneshot(request("{}")).await.unwrap();
                printed.debug(response.body());
                printed.debug(response.extensions());
                printed.refusal(response.extensions().get::<Refusal>().unwrap().clone().into());
            }
        }
    }

    // What the service inside is given, and a key that is refused twice, with a reload that fails in the end.
    let answer: Arc<Mutex<Option<Load>>> = Arc::default();
    let source = source::from_fn_with("vault", None, Arc::clone(&answer), async |answer| {
        let load = *answer.lock().unwrap();
        load.map_or_else(|| Err("closed".into()), |load| load())
    });
    *answer.lock().unwrap() = Some(|| Ok(Some(Credential::key(format!("leak-id:{SECRET}"))?)));
    let store = CredentialStore::builder(source).build().await.unwrap();
    *answer.lock().unwrap() = Some(|| Ok(Some(Credential::key(format!("next-id:{NEXT}"))?)));
    let given: Arc<Mutex<Printed>> = Arc::default();
    let noted = Arc::clone(&given);
    let service = tower_fal::layer(&store).layer(service_fn(move |request: Request<ReplayBody<Full<Bytes>>>| {
        noted.lock().unwrap().debug(&request);
        noted.lock().unwrap().debug(request.extensions());
        let answer = echo(StatusCode::UNAUTHORIZED, 0, &request);
        async move { Ok::<_, BoxError>(answer) }
    }));
    let request = || Request::post("https://fal.run/a").body(Full::<Bytes>::from("{}")).unwrap();
    printed.refusal(service.clone().oneshot(request()).await.unwrap_err());
    assert_eq!(given.lock().unwrap().texts.len(), 2 * 2 * 3, "it was sent twice");
    *answer.lock().unwrap() = Some(|| Ok(Some(Credential::key(SECRET)?)));
    let error = service.oneshot(request()).await.unwrap_err();
    assert!(error.refusal().unwrap().reload_error().is_some());
    printed.refusal(error);
    printed.texts.append(&mut given.lock().unwrap().texts);

    let broken = tower_fal::layer(&store).layer(service_fn(async |_: Request<ReplayBody<Full<Bytes>>>| {
        Err::<Response<Full<Bytes>>, _>(io::Error::from(io::ErrorKind::ConnectionReset))
    }));
    printed.error(&broken.oneshot(request()).await.unwrap_err());
}

/// In how many ways [`echo`] echoes.
const ECHOES: usize = 12;

/// An answer with the credential of the request in its headers, its error type and its body.
fn echo<B>(status: StatusCode, number: usize, request: &Request<B>) -> Response<Full<Bytes>> {
    let header = request.headers()[AUTHORIZATION].to_str().unwrap();
    let (_, value) = header.split_once(' ').unwrap();
    let secret = value.split_once(':').map_or(value, |(_, secret)| secret);
    let body = match number {
        0 => format!(r#"{{"detail":"No user found for {header}","error_type":"{secret}"}}"#),
        1 => format!(r#"{{"error":{{"type":"{secret}","message":"who is {value}?"}}}}"#),
        2 => format!(r#"{{"detail":[{{"msg":"{value}"}},{{"msg":"{secret}{secret}","input":"{header}"}}]}}"#),
        3 => format!(r#""User is locked. Reason: {value}.""#),
        4 => format!("<html><title>{header} was refused</title>{header}</html>"),
        5 => header.to_owned(),
        // It would be cut in the middle of a secret, wherever that is.
        6 => format!("{}{value}", "x".repeat(280)),
        7 => format!("{}{secret}", "x".repeat(290)),
        8 => format!("{}{secret}", " x".repeat(2040)),
        9 => format!("x{}{secret}", " ".repeat(4096 - 17)),
        10 => format!(r#"{{"detail":"x{}{secret}""#, " ".repeat(4096 - 30)),
        11 => format!("x{}{}", " ".repeat(4096 - 300), format!("{secret}\n").repeat(1000)),
        _ => unreachable!("there are {ECHOES}"),
    };
    let mut answer = Response::new(Full::from(body));
    *answer.status_mut() = status;
    for name in ["x-fal-request-id", "x-fal-error-type", "x-fal-served-from", "x-echo"] {
        if name != "x-fal-served-from" || number % 4 == 1 {
            answer.headers_mut().insert(name, HeaderValue::from_str(header).unwrap());
        }
    }
    answer
}

fn fixed() -> CredentialStore {
    CredentialStore::fixed(Credential::key(format!("leak-id:{SECRET}")).unwrap())
}

/// How the source of the next function answers.
type Load = fn() -> Result<Option<Credential>, BoxError>;

async fn a_source_in_trouble(printed: &mut Printed) {
    let answer: Arc<Mutex<Option<Load>>> = Arc::default();
    let source = source::from_fn_with("vault", Duration::from_secs(5), Arc::clone(&answer), async |answer| {
        let load = *answer.lock().unwrap();
        match load {
            Some(load) => load(),
            None => std::future::pending().await,
        }
    });
    let source = BoxSource::new(source);
    printed.debug(&source);
    let set = |load: Load| *answer.lock().unwrap() = Some(load);
    let good: Load = || Ok(Some(Credential::key(format!("leak-id:{SECRET}"))?));
    let next: Load = || Ok(Some(Credential::key(format!("next-id:{NEXT}"))?));
    let bad: [Load; 13] = [
        || Ok(None),
        || Err("connection refused".into()),
        || Err(io::Error::from(io::ErrorKind::PermissionDenied).into()),
        || Ok(Some(Credential::key(SECRET)?)),
        // As a panic does whose message holds the secret, but for the hook, which would print it.
        || std::panic::resume_unwind(Box::new(format!("cannot use {SECRET}"))),
        || Ok(Some(Credential::bearer(format!("e30.eyJleHAiOjF9.{SECRET}"))?)), // expired in 1970
        // Errors of others that hold it: in their `Debug`, in their text, in a cause.
        || Ok(Some(Credential::key(String::from_utf8([SECRET.as_bytes(), b"\xFF"].concat())?)?)),
        || Ok(Some(Credential::key(serde_json::from_str::<u8>(&format!("\"{SECRET}\""))?.to_string())?)),
        || Err(io::Error::other(serde_json::from_str::<u8>(&format!("\"{SECRET}\"")).unwrap_err()).into()),
        || Err(format!("GET https://vault/v1/fal?token={SECRET} failed, after https://me:{SECRET}@vault/").into()),
        || Err(format!("the vault refused `Bearer {SECRET}` and leak-id:{SECRET}").into()),
        || Err(format!("unexpected answer {{\"secret\":\"{SECRET}\"}}, or in bytes {:?}", SECRET.as_bytes()).into()),
        || Err(format!("{} {SECRET}", "x ".repeat(245)).into()), // it is cut off there
    ];

    set(good);
    let builder = CredentialStore::builder(source.clone()).load_timeout(Duration::from_secs(2)).name("leak-store");
    printed.debug(&builder);
    let store = builder.build().await.unwrap();
    printed.store(&store);
    for load in bad {
        set(load);
        printed.reload_error(&store.reload().await.unwrap_err());
        printed.store(&store);
        if let Err(error) = CredentialStore::builder(source.clone()).build().await {
            printed.error(&error);
        }
    }
    *answer.lock().unwrap() = None;
    printed.reload_error(&store.reload().await.unwrap_err());
    printed.store(&store);

    set(good);
    let refused = store.generation();
    printed.debug(&store.reload().await.unwrap());
    printed.debug(&store.reload_past(refused).await.unwrap()); // the same one
    printed.debug(&store.reload_past(refused).await.unwrap()); // cooling down
    set(next);
    printed.debug(&store.reload().await.unwrap());
    printed.debug(&store.reload_past(refused).await.unwrap());
    printed.store(&store);
    printed.debug(&store.replace(Credential::bearer(SECRET).unwrap()));
    printed.store(&store);
    let never = fixed().reload().await.unwrap_err();
    assert!(matches!(never, ReloadError::NeverReloads));
    printed.error(&never);
}

/// Returns the store, which outlives its runtime.
async fn a_file_in_trouble(printed: &mut Printed) -> CredentialStore {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("key");
    fs::write(&path, format!("leak-id:{SECRET}\n")).unwrap();
    let source = FileSource::new(&path);
    printed.debug(&source);
    let store = CredentialStore::builder(source).build().await.unwrap();
    printed.store(&store);

    let mut contents = malformed();
    contents.extend([Vec::new(), b"\n".to_vec(), SECRET.repeat(3000).into_bytes()]);
    for content in contents {
        fs::write(&path, content).unwrap();
        printed.reload_error(&store.reload().await.unwrap_err());
        printed.store(&store);
        printed.error(&CredentialStore::builder(FileSource::new(&path)).build().await.unwrap_err());
    }
    fs::remove_file(&path).unwrap();
    printed.reload_error(&store.reload().await.unwrap_err());
    fs::create_dir(&path).unwrap();
    printed.reload_error(&store.reload().await.unwrap_err());
    fs::remove_dir(&path).unwrap();

    fs::write(&path, format!("next-id:{NEXT}\n")).unwrap();
    make_world_writable(&path);
    printed.debug(&store.reload().await.unwrap());
    assert_eq!(store.status().key_id.unwrap().as_str(), "next-id");
    printed.store(&store);
    store
}

/// Sources that are made of others, or read more than the key.
async fn halves_lines_and_chains(printed: &mut Printed) {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    let (id, secret, dotenv, key) = (file("id"), file("secret"), file(".env"), file("key"));
    fs::write(&id, "leak-id\n").unwrap();
    let pair = || FileSource::pair(&id, &secret);
    let env = || DotenvSource::new(&dotenv);
    let chain =
        || ChainSource::new().push(EnvSource::all().environment(|_| None)).push(env().if_present()).push(pair());
    printed.debug(&pair());
    printed.debug(&env());
    printed.debug(&chain());

    for good in [format!("next-id:{NEXT}"), format!("leak-id:{SECRET}")] {
        let (_, half) = good.split_once(':').unwrap();
        fs::write(&secret, half).unwrap();
        fs::write(&dotenv, format!("OTHER={NEXT}\nexport FAL_KEY='{good}' # {SECRET}\n")).unwrap();
        for store in [
            CredentialStore::builder(pair()).build().await.unwrap(),
            CredentialStore::builder(env()).build().await.unwrap(),
            CredentialStore::builder(chain()).build().await.unwrap(),
        ] {
            printed.store(&store);
        }
    }

    let stores = [
        CredentialStore::builder(pair()).build().await.unwrap(),
        CredentialStore::builder(env()).build().await.unwrap(),
        CredentialStore::builder(chain()).build().await.unwrap(),
    ];
    let mut failures = 0;
    for bad in malformed() {
        fs::write(&secret, &bad).unwrap();
        let quoted = [b"FAL_KEY='".to_vec(), bad.clone(), b"'\n".to_vec()].concat();
        let bare = [b"OTHER=1\nFAL_KEY=".to_vec(), bad.clone(), b"\n".to_vec()].concat();
        let unclosed = [b"FAL_KEY=\"".to_vec(), bad].concat();
        for lines in [quoted, bare, unclosed] {
            fs::write(&dotenv, lines).unwrap();
            for store in &stores {
                // Some are good halves.
                match store.reload().await {
                    Ok(reloaded) => printed.debug(&reloaded),
                    Err(error) => {
                        failures += 1;
                        printed.reload_error(&error);
                    }
                }
                printed.status(&store.status());
            }
        }
    }
    assert!(failures > 60, "only {failures} loads failed");

    // Halves of two keys, a variable that is set twice, a name in which one puts the key, and a file in between.
    fs::write(&id, format!("next-id:{NEXT}")).unwrap();
    fs::write(&secret, SECRET).unwrap();
    fs::write(&dotenv, format!("FAL_KEY=leak-id:{SECRET}\nFAL_KEY=next-id:{NEXT}\n")).unwrap();
    fs::write(&key, format!("leak-id:{SECRET}")).unwrap();
    let path = key.clone();
    let shadowed = move |name: &str| match name {
        "FAL_KEY" => Some(OsString::from(format!("next-id:{NEXT}"))),
        "FAL_KEY_FILE" => Some(path.clone().into()),
        _ => None,
    };
    let shadowing = ChainSource::new().push(EnvSource::all().environment(shadowed)).push(FileSource::new(&key));
    for store in &stores {
        printed.reload_error(&store.reload().await.unwrap_err());
        printed.store(store);
    }
    printed.error(&DotenvSource::new(&dotenv).variable(format!("FAL_KEY={SECRET}")).load().await.unwrap_err());
    printed.store(&CredentialStore::builder(shadowing).build().await.unwrap());
}

fn make_world_writable(path: &Path) {
    #[cfg(unix)]
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    #[cfg(not(unix))]
    tracing::warn!("{path:?} is writable by everyone"); // nothing there warns of it
}

/// Everything that was printed, in every way in which it can be.
#[derive(Default)]
struct Printed {
    texts: Vec<String>,
}

impl Printed {
    fn debug(&mut self, value: &(impl Debug + ?Sized)) {
        self.texts.extend([format!("{value:?}"), format!("{value:#?}"), format!("{value:x?}")]);
    }

    fn display(&mut self, value: &(impl Display + ?Sized)) {
        self.texts.push(value.to_string());
    }

    fn error(&mut self, error: &(dyn Error + 'static)) {
        self.texts.push(report(error));
        let mut next = Some(error);
        while let Some(error) = next {
            self.debug(error);
            self.display(error);
            next = error.source();
        }
    }

    fn reload_error(&mut self, error: &ReloadError) {
        self.error(error);
        if let ReloadError::Failed(error) = error {
            self.debug(&error.kind());
            self.display(error.source_name());
        }
    }

    fn refusal(&mut self, error: FalAuthError) {
        self.error(&error);
        self.debug(&error.is_retryable());
        let refusal = error.refusal().expect("it was refused");
        self.error(refusal);
        self.debug(&(refusal.detail(), refusal.error_type(), refusal.request_id(), refusal.source_name()));
        self.debug(&(refusal.reason(), refusal.key_id(), refusal.generation()));
        assert!(refusal.detail().is_some() && refusal.request_id().is_some(), "nothing was echoed");
        if let Some(error) = refusal.reload_error() {
            self.reload_error(error);
        }
        let boxed: BoxError = error.into();
        self.debug(&boxed);
        self.error(&io::Error::other(boxed));
    }

    fn credential(&mut self, credential: &Credential) {
        self.debug(credential);
        self.debug(credential.header());
        self.debug(&HeaderValue::clone(credential.header()));
        self.debug(&(credential.expires_at(), credential.source(), credential.scheme()));
        self.display(&credential.scheme());
        if let Some(key_id) = credential.key_id() {
            self.debug(key_id);
            self.display(key_id);
        }
    }

    fn snapshot(&mut self, snapshot: &Snapshot) {
        self.debug(snapshot);
        self.credential(snapshot.credential());
        self.display(&snapshot.generation());
        self.display(snapshot.source());
    }

    fn store(&mut self, store: &CredentialStore) {
        self.debug(store);
        self.snapshot(&store.load());
        self.debug(&store.subscribe());
        self.status(&store.status());
    }

    fn status(&mut self, status: &Status) {
        self.debug(status);
        self.debug(&(status.degraded().collect::<Vec<_>>(), status.last_refusal()));
        self.texts.push(serde_json::to_string(status).unwrap());
        if let Some(error) = &status.last_error {
            self.error(error);
        }
    }
}

/// The part of a secret that stands in a text: six of its characters in a row, as they are or as numbers.
fn find_secret(text: &str) -> Option<String> {
    let text: String = text.chars().filter(|char| !char.is_whitespace()).collect();
    let lower = text.to_ascii_lowercase();
    [SECRET, NEXT].iter().flat_map(|secret| secret.as_bytes().windows(6)).find_map(|part| {
        let plain = String::from_utf8(part.to_vec()).unwrap();
        let list = |number: fn(&u8) -> String| part.iter().map(number).collect::<Vec<_>>();
        let decimal = list(u8::to_string).join(",");
        let hex = list(|byte| format!("{byte:02x}"));
        let found = text.contains(&plain)
            || text.contains(&decimal)
            || lower.contains(&hex.join(","))
            || lower.contains(&hex.concat());
        found.then_some(plain)
    })
}
