//! `event-delivery`: what we tell the customer's own systems.

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    shared::trigger::run(event_delivery::Delivery::new).await
}
