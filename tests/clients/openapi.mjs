// Asks a running stack every operation of openapi.yaml: without a sign-in, which must be refused as the document says, and then as a user,
// whose answers are held against the schemas.
import { readFileSync } from 'node:fs'
import Ajv from 'ajv/dist/2020.js'
import addFormats from 'ajv-formats'

const { document, origin, apikey, user, organization } = JSON.parse(readFileSync(process.env.OPENAPI, 'utf8'))
const functions = `${origin}/functions/v1`
const local = (value) => JSON.parse(JSON.stringify(value).replaceAll('#/components/schemas/', '#/$defs/'))
const defs = local(document.components.schemas)
const ajv = new Ajv({ allErrors: true, strict: true, allowUnionTypes: true, strictRequired: false, strictTypes: false })
addFormats(ajv)
const resolved = (value) =>
  value?.$ref ? value.$ref.slice(2).split('/').reduce((at, name) => at[name], document) : value

const operations = []
for (const [path, item] of Object.entries(document.paths))
  for (const method of ['get', 'post', 'patch', 'delete'])
    if (item[method])
      operations.push({ method, path, ...item[method], parameters: [...(item.parameters ?? []), ...(item[method].parameters ?? [])].map(resolved) })

const wrong = []
const told = { operations: operations.length, refused: 0, done: {}, wrong }

// The declared answer for a status, or the refusal that stands for every other.
const judge = (operation, status, type, text) => {
  const name = `${operation.method.toUpperCase()} ${operation.path}`
  const answer = resolved(operation.responses[status] ?? (status >= 400 ? operation.responses.default : undefined))
  const content = answer?.content?.[type.split(';')[0]]
  if (!content) return wrong.push(`${name}: ${status} ${type} is not declared: ${text.slice(0, 200)}`)
  if (!type.startsWith('application/json')) return
  const body = JSON.parse(text)
  const validate = ajv.compile({ ...local(content.schema), $defs: defs })
  if (!validate(body)) wrong.push(`${name}: ${status} ${ajv.errorsText(validate.errors)}: ${text.slice(0, 400)}`)
  return body
}

const ask = async (operation, { token, values = {}, query = '', body, key } = {}) => {
  const path = operation.path.replaceAll(/\{(\w+)\}/g, (_, name) => {
    const schema = resolved(operation.parameters.find((parameter) => parameter.name === name).schema)
    return values[name] ?? schema.enum?.[0] ?? (schema.type === 'integer' ? '1' : '00000000-0000-4000-8000-000000000000')
  })
  const headers = { apikey, 'content-type': 'application/json' }
  if (token) headers.authorization = `Bearer ${token}`
  if (key) headers['idempotency-key'] = key
  const request = { method: operation.method.toUpperCase(), headers }
  if (request.method !== 'GET') request.body = JSON.stringify(body ?? {})
  const response = await fetch(`${functions}${path}${query}`, request)
  return { status: response.status, type: response.headers.get('content-type') ?? '', text: await response.text() }
}

for (const operation of operations) {
  const { status, type, text } = await ask(operation)
  const body = judge(operation, status, type, text)
  if (![400, 401, 403].includes(status)) wrong.push(`${operation.method} ${operation.path}: ${status} to nobody: ${text.slice(0, 200)}`)
  else told.refused += 1
}

const operation = (method, path) => {
  const found = operations.find((one) => one.method === method && one.path === path)
  if (!found) throw new Error(`${method} ${path} is not in the document`)
  return found
}
const as = async (method, path, given = {}) => {
  const asked = operation(method, path)
  const token = asked.security?.some((one) => 'organization' in one) ? organization : user
  const { status, type, text } = await ask(asked, { token, ...given })
  if (status < 300) told.done[`${method} ${path}`] = status
  return judge(asked, status, type, text)
}

const leads = await fetch(`${origin}/rest/v1/leads?select=id`, {
  method: 'POST',
  headers: { apikey, authorization: `Bearer ${user}`, 'content-type': 'application/json', prefer: 'return=representation' },
  body: JSON.stringify([{ name: 'Asha', phone: '+919812340001' }, { name: 'Ravi', phone: '+919812340002' }]),
}).then((answer) => answer.json())
const campaign = await as('post', '/call-dispatch/campaigns', { body: { name: 'By the document' } })
const values = { id: campaign.id }
await as('post', '/call-dispatch/campaigns/{id}/preview', { values })
for (const action of ['start', 'pause', 'resume', 'pause'])
  await as('post', '/call-dispatch/campaigns/{id}/{action}', { values: { ...values, action } })
await as('get', '/call-dispatch/campaigns/{id}', { values })
await as('post', '/call-dispatch/calls', { body: { campaign_id: campaign.id, lead_id: leads[0].id } })
await as('get', '/usage-metering/usage')
await as('get', '/usage-metering/usage.html')
const event = { specversion: '1.0', id: '1', source: 'app', type: 'sms_messages', data: { quantity: 3 } }
await as('post', '/usage-metering/usage/events', { body: event })
await as('post', '/usage-metering/usage/events', { body: [event, { ...event, id: '2', type: 'none' }] })
await as('post', '/usage-metering/usage/link')
await as('post', '/usage-metering/usage/holds', { body: { source: 'app', id: '3', type: 'sms_messages', quantity: 2 } })
await as('post', '/usage-metering/usage/holds/release', { body: { source: 'app', id: '3' } })
await as('get', '/usage-metering/usage/daily')
await as('get', '/usage-metering/usage/daily.csv')
await as('get', '/invoice-generation/invoices')
await as('post', '/invoice-generation/invoices/preview')
const span = { query: '?from=2026-01-01&to=2026-12-31' }
for (const name of ['export.csv', 'lines.csv', 'payments.csv', 'gstr1.json']) await as('get', `/invoice-generation/invoices/${name}`, span)
await as('get', '/invoice-generation/credit-notes')
await as('get', '/invoice-generation/payment-methods')
await as('get', '/invoice-generation/subscriptions')
await as('post', '/invoice-generation/subscriptions/{action}', { values: { action: 'cancel' }, body: { timing: 'period_end' }, key: 'a' })
const endpoint = await as('post', '/event-delivery/endpoints', { body: { url: 'https://example.com/hooks', events: ['call.*'] } })
const its = { values: { id: endpoint.id } }
await as('get', '/event-delivery/endpoints')
await as('get', '/event-delivery/endpoints/{id}', its)
await as('patch', '/event-delivery/endpoints/{id}', { ...its, body: { description: 'The CRM' } })
const test = await as('post', '/event-delivery/endpoints/{id}/{action}', { values: { id: endpoint.id, action: 'test' } })
await as('get', '/event-delivery/endpoints/{id}/deliveries', its)
await as('get', '/event-delivery/deliveries/{id}', { values: { id: test.delivery_id } })
await as('post', '/event-delivery/endpoints/{id}/{action}', { values: { id: endpoint.id, action: 'disable' } })
await as('delete', '/event-delivery/endpoints/{id}', its)
await as('post', '/webhook-intake/sources', { body: { provider: 'retell', secret: 'x'.repeat(32) } })

console.log(JSON.stringify(told))
