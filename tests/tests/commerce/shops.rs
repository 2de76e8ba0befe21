//! Shopify and WooCommerce.

use super::*;
use base64::{Engine, engine::general_purpose::STANDARD};
use shared::mac::{self, Hash};
use tests::Fingerprint;

/// What an order's deliveries decide: the order, its lines, its customer, what the customer spent.
const ORDER: &str = "select coalesce(jsonb_agg(
    to_jsonb(o) - array['id', 'organization_id', 'store_id', 'customer_id', 'last_synced_at', 'created_at', 'updated_at']
    || jsonb_build_object(
      'lines', (select jsonb_agg(to_jsonb(l) - array['id', 'organization_id', 'store_id', 'order_id', 'created_at', 'updated_at'] order by l.external_id)
        from public.order_line_items as l where l.order_id = o.id),
      'customer', (select to_jsonb(c) - array['id', 'organization_id', 'store_id', 'last_synced_at', 'created_at', 'updated_at'] from public.customers as c where c.id = o.customer_id),
      'totals', (select jsonb_agg(jsonb_build_array(t.currency_code, t.total_orders, t.total_spent_minor, t.lifetime_value_minor))
        from public.customer_totals as t where t.customer_id = o.customer_id)
    )), '[]')::text from public.orders as o";

impl Stand {
    async fn shop(&self, topic: &str, result: &str) -> Result<()> {
        let body = delivery("shopify", &topic.replace('/', "_"))?;
        self.expect(&shopify(self.shopify, topic, &body), result).await.with_context(|| topic.to_owned())
    }

    async fn woo(&self, topic: &str, name: &str, result: &str) -> Result<()> {
        let body = delivery("woocommerce", name)?;
        self.expect(&woocommerce(self.woocommerce, topic, &body), result).await.with_context(|| name.to_owned())
    }

    async fn order(&self) -> Result<Value> {
        let all: Value = serde_json::from_str(&self.value(ORDER).await?)?;
        Ok(all[0].clone())
    }
}

#[track_caller]
fn assert_has(row: &Value, expected: Value) {
    for (key, value) in expected.as_object().into_iter().flatten() {
        assert_eq!(&row[key], value, "{key} of {row:#}");
    }
}

#[tokio::test]
async fn every_delivery_of_shopify_changes_the_row_that_it_names() -> Result<()> {
    let stand = Stand::start().await?;
    stand.shop("products/create", "applied").await?;
    let product = "select concat_ws('|', external_id, title, price_minor, compare_at_price_minor, currency_code, sku, inventory_quantity, inventory_tracked,
        availability, status, is_published, weight, tags, external_variant_id, (select count(*) from public.product_images)) from public.products";
    assert_eq!(
        stand.value(product).await?,
        "788032119674292922|Mug & Saucer|50000|65000|INR|IPOD2008PINK|70|t|in_stock|active|t|0.567|{blue,kitchen}|808950810|1"
    );
    stand.shop("products/update", "applied").await?;
    assert_eq!(
        stand.value(product).await?,
        "788032119674292922|Mug & Saucer|45050|65000|INR|IPOD2008PINK|0|t|out_of_stock|archived|f|0.567|{blue,kitchen}|808950810|0"
    );
    stand.shop("products/create", "ignored").await?;

    stand.shop("orders/create", "applied").await?;
    let order = stand.order().await?;
    assert_has(
        &order,
        json!({
            "external_id": "820982911946154508", "order_number": "#1001", "customer_external_id": "9007199254740993",
            "customer_email": "asha@example.com", "customer_phone": "+919812345678", "customer_first_name": "Asha",
            "subtotal_price_minor": 119_900, "total_tax_minor": 5_000, "total_shipping_minor": 4_900, "total_discounts_minor": 100,
            "total_price_minor": 129_800, "total_refunded_minor": 0, "currency_code": "INR", "status": "pending",
            "payment_status": "pending", "fulfillment_status": "unfulfilled", "shipping_method": "Standard",
            "customer_notes": "Ring twice", "order_date": "2026-11-24T04:30:00+00:00",
        }),
    );
    assert_eq!(order["shipping_address"]["company"], "Rao & Sons");
    assert_eq!(order["totals"], json!([["INR", 1, 129_800, 129_800]]));
    let lines = order["lines"].as_array().context("lines")?;
    assert_eq!(lines.len(), 2);
    assert_has(
        &lines[1],
        json!({
            "external_id": "866550311766439020", "external_product_id": "788032119674292922", "title": "Mug & Saucer",
            "price_minor": 50_000, "quantity": 2, "total_price_minor": 99_900, "sku": "IPOD2008PINK",
            "properties": { "Engraving": "A & R" }, "fulfillment_status": "unfulfilled", "fulfilled_quantity": 0,
        }),
    );
    assert!(lines[1]["product_id"].is_string(), "the line is the product's");

    stand.shop("orders/updated", "applied").await?;
    let order = stand.order().await?;
    assert_has(&order, json!({ "total_price_minor": 109_800, "customer_notes": "Ring thrice" }));
    assert_eq!(order["lines"].as_array().map(Vec::len), Some(1), "a line that is gone is gone");
    stand.shop("orders/paid", "applied").await?;
    assert_has(&stand.order().await?, json!({ "status": "confirmed", "payment_status": "paid" }));
    stand.shop("orders/partially_fulfilled", "applied").await?;
    let order = stand.order().await?;
    assert_has(
        &order,
        json!({
            "status": "processing", "fulfillment_status": "partial", "tracking_number": "BD123",
            "tracking_url": "https://track.example.com/BD123", "shipped_date": "2026-11-24T06:30:00+00:00", "delivered_date": null,
        }),
    );
    assert_has(&order["lines"][0], json!({ "fulfillment_status": "partial", "fulfilled_quantity": 1 }));
    stand.shop("orders/fulfilled", "applied").await?;
    let order = stand.order().await?;
    assert_has(
        &order,
        json!({ "status": "delivered", "fulfillment_status": "fulfilled", "delivered_date": "2026-11-25T03:30:00+00:00" }),
    );
    assert_has(&order["lines"][0], json!({ "fulfillment_status": "fulfilled", "fulfilled_quantity": 2 }));
    stand.shop("refunds/create", "applied").await?;
    assert_has(
        &stand.order().await?,
        json!({ "total_refunded_minor": 9_800, "totals": [["INR", 1, 109_800, 100_000]] }),
    );
    stand.shop("orders/cancelled", "applied").await?;
    assert_has(
        &stand.order().await?,
        json!({
            "status": "cancelled", "payment_status": "partially_refunded", "total_refunded_minor": 9_800, "totals": null,
            "cancelled_date": "2026-11-26T03:30:00+00:00", "is_standing": false,
        }),
    );

    stand.shop("customers/create", "applied").await?;
    let customer = "select concat_ws('|', external_id, email, phone, first_name, accepts_marketing, tags, total_orders) from public.customers";
    assert_eq!(
        stand.value(customer).await?,
        "9007199254740993|asha@example.com|+919812345678|Asha|t|{VIP,Bengaluru}|0"
    );
    stand.shop("customers/update", "applied").await?;
    assert_eq!(stand.value(customer).await?, "9007199254740993|asha.rao@example.com|+919812345678|Asha|f|{VIP}|0");
    stand.shop("customers/disable", "applied").await?;
    assert_eq!(
        stand.value(customer).await?,
        "9007199254740993|asha.rao@example.com|+919812345678|Asha|f|{VIP,disabled}|0"
    );
    stand.shop("customers/enable", "applied").await?;
    assert_eq!(stand.value(customer).await?, "9007199254740993|asha.rao@example.com|+919812345678|Asha|t|{VIP}|0");
    stand.shop("customers/data_request", "applied").await?;
    let request = "select concat_ws('|', kind, external_id, customer_external_id, order_external_ids, (customer_id is not null), completed_at) from public.privacy_requests";
    assert_eq!(stand.value(request).await?, "data_request|9999|9007199254740993|{820982911946154508}|t");
    stand.shop("customers/redact", "applied").await?;
    assert_has(
        &stand.order().await?,
        json!({
            "customer_email": null, "customer_phone": null, "customer_first_name": null, "shipping_address": null,
            "customer_external_id": null, "customer": null, "total_price_minor": 109_800,
        }),
    );
    let traces = "select count(*) from private.webhook_events where kind <> 'customers/data_request'
        and coalesce(body, '') || coalesce(payload::text, '') ~ 'asha|9812345678'";
    assert_eq!(stand.value(traces).await?, "0", "no event tells of them any more");

    stand.shop("products/delete", "applied").await?;
    assert_eq!(stand.value("select count(*) from public.products").await?, "0");
    stand.shop("orders/delete", "applied").await?;
    assert_eq!(stand.value("select count(*) from public.orders").await?, "0");
    stand.shop("customers/delete", "applied").await?;
    assert_eq!(stand.value("select count(*) from public.customers where external_id = '9007199254740993'").await?, "0");
    for topic in ["products/update", "orders/cancelled", "customers/update"] {
        stand.shop(topic, "ignored").await?;
    }
    stand.shop("app/uninstalled", "applied").await?;
    let status = "select status from public.stores where domain = 'shop.example.com'";
    assert_eq!(stand.value(status).await?, "disconnected");
    stand.shop("shop/redact", "applied").await?;
    let kept = "select count(*) from private.webhook_events where source = 'shopify' and body is not null";
    assert_eq!(stand.value(kept).await?, "0");
    Ok(())
}

#[tokio::test]
async fn every_delivery_of_woocommerce_changes_the_row_that_it_names() -> Result<()> {
    let stand = Stand::start().await?;
    let ping = HttpEvent::post(&path("woocommerce", stand.woocommerce))
        .header("content-type", "application/x-www-form-urlencoded")
        .body("webhook_id=12");
    assert_eq!(ping.send(&stand.intake).await?.status, 200, "the ping of a new webhook is unsigned");
    assert_eq!(stand.value("select count(*) from private.webhook_events").await?, "0", "and not kept");
    let not_a_ping = ping.clone().body("webhook_id=12&status=completed");
    assert_eq!(not_a_ping.send(&stand.intake).await?.status, 403);

    stand.woo("product.created", "product_created", "applied").await?;
    let product = "select concat_ws('|', external_id, title, price_minor, compare_at_price_minor, currency_code, inventory_quantity, availability, status, is_published, tags) from public.products";
    assert_eq!(stand.value(product).await?, "93|Woo Single #1|950|1000|JPY|7|in_stock|active|t|{vinyl}");
    stand.woo("product.updated", "product_updated", "applied").await?;
    assert_eq!(stand.value(product).await?, "93|Woo Single #1|950|1000|JPY|0|backorder|draft|f|{vinyl}");
    stand.woo("order.created", "order_created", "applied").await?;
    let order = stand.order().await?;
    assert_has(
        &order,
        json!({
            "external_id": "727", "currency_code": "JPY", "total_price_minor": 2_400, "subtotal_price_minor": 1_900,
            "total_shipping_minor": 500, "total_discounts_minor": 100, "status": "pending", "payment_status": "pending",
            "customer_email": "ken@example.jp", "customer_external_id": "26", "order_date": "2026-11-24T10:28:02+00:00",
            "customer_notes": "Gift & card",
        }),
    );
    assert_has(
        &order["lines"][0],
        json!({ "price_minor": 950, "total_price_minor": 1_900, "quantity": 2, "properties": { "pa_color": "black" } }),
    );
    assert_has(&order["customer"], json!({ "external_id": "26", "phone": "+81312345678", "first_name": "Ken" }));
    stand.woo("order.updated", "order_updated", "applied").await?;
    assert_has(&stand.order().await?, json!({ "status": "confirmed", "payment_status": "paid" }));
    stand.woo("order.updated", "order_updated_completed", "applied").await?;
    assert_has(
        &stand.order().await?,
        json!({
            "status": "delivered", "payment_status": "partially_refunded", "fulfillment_status": "fulfilled",
            "total_refunded_minor": 400, "totals": [["JPY", 1, 2_400, 2_000]],
        }),
    );
    stand.woo("customer.created", "customer_created", "applied").await?;
    stand.woo("customer.updated", "customer_updated", "applied").await?;
    assert_eq!(stand.value("select first_name from public.customers").await?, "Kenji");
    stand.woo("order.deleted", "order_deleted", "applied").await?;
    stand.woo("order.updated", "order_updated", "ignored").await?;
    assert_eq!(stand.value("select count(*) from public.orders").await?, "0");
    stand.woo("order.restored", "order_restored", "applied").await?;
    assert_has(&stand.order().await?, json!({ "external_id": "727", "status": "delivered" }));
    stand.woo("product.deleted", "product_deleted", "applied").await?;
    assert_eq!(stand.value("select count(*) from public.products").await?, "0");
    stand.woo("product.restored", "product_restored", "applied").await?;
    assert_eq!(stand.value("select status || ' ' || (select count(*) from public.order_line_items where product_id is not null) from public.products").await?, "active 1");
    stand.woo("customer.deleted", "customer_deleted", "applied").await?;
    assert_eq!(stand.value("select count(*) from public.customers").await?, "0");
    Ok(())
}

#[tokio::test]
async fn an_order_s_deliveries_in_any_order_and_twice_end_in_the_same_row() -> Result<()> {
    const TOPICS: [&str; 6] =
        ["orders/create", "orders/updated", "orders/paid", "orders/fulfilled", "orders/cancelled", "customers/create"];
    let stand = Stand::start().await?;
    let bodies = TOPICS.map(|topic| delivery("shopify", &topic.replace('/', "_")));
    let mut first: Option<Value> = None;
    // All of five, with the customer's somewhere among them.
    for (round, mut order) in orders(5).into_iter().enumerate() {
        order.insert(round % 6, 5);
        for step in order.iter().chain(&order[..3]) {
            let body = bodies[*step].as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
            let answer = shopify(stand.shopify, TOPICS[*step], body).send(&stand.intake).await?;
            assert!(["applied", "ignored"].contains(&result(&answer).as_str().unwrap_or_default()), "{}", answer.body);
        }
        let row = stand.order().await?;
        assert_eq!(row["status"], "cancelled", "{order:?}");
        match &first {
            None => first = Some(row),
            Some(first) => assert_eq!(&row, first, "order {order:?} of {TOPICS:?} ends in another row"),
        }
        stand.stack.sql.batch_execute("delete from public.orders; delete from public.customers").await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_order_s_deliveries_all_at_once_end_in_that_row_too() -> Result<()> {
    let topics =
        ["orders/create", "orders/paid", "orders/fulfilled", "orders/cancelled", "refunds/create", "customers/create"];
    let stand = Stand::start().await?;
    let mut events = Vec::new();
    for topic in topics.iter().chain(&topics) {
        events.push(shopify(stand.shopify, topic, &delivery("shopify", &topic.replace('/', "_"))?));
    }
    for answer in futures::future::join_all(events.iter().map(|event| event.send(&stand.intake))).await {
        let answer = answer?;
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    stand.sweep().await?;
    let row = stand.order().await?;
    assert_has(
        &row,
        json!({ "status": "cancelled", "payment_status": "partially_refunded", "total_refunded_minor": 9_800, "totals": null }),
    );
    assert_eq!(row["lines"].as_array().map(Vec::len), Some(1));
    assert_eq!(
        stand.value("select count(*) from private.webhook_events where status not in ('applied', 'ignored')").await?,
        "0"
    );
    Ok(())
}

#[tokio::test]
async fn a_delivery_again_is_a_duplicate_and_a_foreign_one_changes_nothing() -> Result<()> {
    let stand = Stand::start().await?;
    let body = delivery("shopify", "orders_create")?;
    let event = shopify(stand.shopify, "orders/create", &body);
    stand.expect(&event, "applied").await?;
    let before = Fingerprint::of(&stand.stack.sql).await?;
    stand.expect(&event, "duplicate").await?;
    before.assert_same(&Fingerprint::of(&stand.stack.sql).await?);

    let elsewhere = shopify(stand.shopify, "orders/updated", &delivery("shopify", "orders_updated")?)
        .header("x-shopify-shop-domain", "other.myshopify.com");
    assert_eq!(elsewhere.send(&stand.intake).await?.status, 202);
    let what = "select status || ' ' || error from private.webhook_events order by id desc limit 1";
    assert_eq!(stand.value(what).await?, "orphan other_shop");
    assert_eq!(stand.order().await?["customer_notes"], "Ring twice");

    // Nobody turns the body of one topic into a deletion.
    stand.expect(&shopify(stand.shopify, "orders/delete", &body), "ignored").await?;
    assert_eq!(stand.value("select count(*) from public.orders").await?, "1");
    for (topic, body) in [("themes/publish", &b"{}"[..]), ("orders/create", b"[]"), ("orders/create", b"{\"id\":")] {
        stand.expect(&shopify(stand.shopify, topic, body), "ignored").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_word_that_nobody_mapped_is_counted_and_shown() -> Result<()> {
    let stand = Stand::start().await?;
    let body = String::from_utf8(delivery("shopify", "orders_paid")?)?;
    let odd = body.replace(r#""financial_status":"paid""#, r#""financial_status":"bartered""#);
    stand.expect(&shopify(stand.shopify, "orders/paid", odd.as_bytes()), "applied").await?;
    assert_eq!(stand.order().await?["payment_status"], "pending", "it is not guessed");
    let words = stand.stack.rpc(stand.tenant.jwt(), "list_unmapped_values", &json!({})).await?;
    let word = &words[0];
    assert_eq!(
        (&word["source"], &word["field"], &word["value"], &word["seen"]),
        (&json!("shopify"), &json!("financial_status"), &json!("bartered"), &json!(1))
    );
    Ok(())
}

#[tokio::test]
async fn a_rotated_secret_and_the_one_before_are_both_right() -> Result<()> {
    let stand = Stand::start().await?;
    let path = format!("/functions/v1/webhook-intake/sources/{}/secrets", stand.shopify);
    let rotate = HttpEvent::post(&path).bearer(stand.tenant.jwt()).json(&json!({ "secret": "another" }))?;
    assert_eq!(rotate.send(&stand.intake).await?.status, 200);
    let body = delivery("shopify", "orders_create")?;
    let fresh = stand.stack.intake()?;
    let signed = |secret: &str| {
        let signature = STANDARD.encode(mac::hmac(Hash::Sha256, secret.as_bytes(), &[&body]));
        shopify(stand.shopify, "orders/create", &body).header("x-shopify-hmac-sha256", signature)
    };
    for (secret, status) in [(SECRET, 200), ("another", 200), ("a third", 403)] {
        assert_eq!(signed(secret).send(&fresh).await?.status, status, "{secret}");
    }
    Ok(())
}
