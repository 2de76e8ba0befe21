-- Two policies whose names were longer than a name may be: the server cut them, and what the sources said was not what was there.

-- A change that has to wait behind a long query gives up rather than have every other query wait behind it.
set local lock_timeout = '5s';
set local statement_timeout = '1min';

-- No client names a policy.
-- squawk-ignore renaming-object
alter policy "Who manages members sees the invitations, and the invited their" on public.invitations rename to "Who manages members sees the invitations, the invited their own";
-- No client names a policy.
-- squawk-ignore renaming-object
alter policy "The organization sees who acted in it, and staff their own sess" on public.impersonation_sessions rename to "The organization sees who acted in it, staff their own sessions";
