//! Fetches at once: a bound for the process, and half of it for each tenant, so that one whose file host hangs leaves room
//! for the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

use crate::id::TenantId;

/// The right to fetch, for as many as may at once.
#[derive(Debug)]
pub(super) struct Slots {
    all: Semaphore,
    share: usize,
    /// Of tenants that fetch or wait to, and how many do.
    tenants: Mutex<HashMap<TenantId, (Arc<Semaphore>, usize)>>,
}

/// One fetch, until dropped.
#[derive(Debug)]
pub(super) struct Slot<'a> {
    _all: SemaphorePermit<'a>,
    _share: OwnedSemaphorePermit,
    _user: User<'a>,
}

/// Somebody of a tenant who fetches or waits to.
#[derive(Debug)]
struct User<'a> {
    slots: &'a Slots,
    tenant: TenantId,
}

impl Slots {
    /// So many at once, one at least.
    pub(super) fn new(total: usize) -> Self {
        let total = total.max(1);
        Self {
            all: Semaphore::new(total),
            share: total.div_ceil(2),
            tenants: Mutex::default(),
        }
    }

    /// Waits for a slot, of the tenant's share first: in the line for all there are no more of one tenant than may fetch at
    /// once. None if the semaphores were closed, which they are not.
    pub(super) async fn take(&self, tenant: &TenantId) -> Option<Slot<'_>> {
        let (share, user) = self.user(tenant);
        let share = share.acquire_owned().await.ok()?;
        let all = self.all.acquire().await.ok()?;
        Some(Slot {
            _all: all,
            _share: share,
            _user: user,
        })
    }

    fn user(&self, tenant: &TenantId) -> (Arc<Semaphore>, User<'_>) {
        let mut tenants = self.lock();
        let (share, users) = tenants
            .entry(tenant.clone())
            .or_insert_with(|| (Arc::new(Semaphore::new(self.share)), 0));
        *users += 1;
        let user = User {
            slots: self,
            tenant: tenant.clone(),
        };
        (Arc::clone(share), user)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TenantId, (Arc<Semaphore>, usize)>> {
        self.tenants.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for User<'_> {
    fn drop(&mut self) {
        let mut tenants = self.slots.lock();
        if let Some((_, users)) = tenants.get_mut(&self.tenant) {
            *users -= 1;
            if *users == 0 {
                tenants.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn a_tenant_has_half_of_the_slots_and_leaves_nothing_behind() {
        let slots = Slots::new(3);
        let (a, b): (TenantId, TenantId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let take = |tenant| slots.take(tenant).now_or_never().flatten();
        let of_a = (take(&a).unwrap(), take(&a).unwrap());
        assert!(take(&a).is_none());
        let of_b = take(&b).unwrap();
        assert!(take(&b).is_none(), "all are taken");
        drop(of_a);
        assert!(take(&b).is_some());
        drop(of_b);
        assert!(slots.lock().is_empty());
        assert!(Slots::new(1).take(&a).now_or_never().flatten().is_some());
    }
}
