//! `call-dispatch`: what we say to the phone network.

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    shared::trigger::run(call_dispatch::Dispatch::new).await
}
