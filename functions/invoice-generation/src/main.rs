//! `invoice-generation`: what is billed.

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    shared::trigger::run(invoice_generation::Invoicing::new).await
}
