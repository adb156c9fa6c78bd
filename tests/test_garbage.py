"""What was imported is no matter of the garbage collector's; what the job made is."""

import gc

import pytest

from elastic.garbage import freeze_imported, importing, referrers


def test_modules_are_imported_without_collections_and_later_ones_do_not_look_at_them():
    with importing():
        assert not gc.isenabled()
        imported = [None]
    assert gc.isenabled()
    assert not any(found is imported for found in gc.get_objects())


def test_collections_that_were_off_stay_off_and_go_on_when_all_imports_have_ended():
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    first, second = importing(), importing()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_collections_go_on_after_an_import_that_failed():
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


@pytest.mark.parametrize("freezes", [False, True])
def test_who_refers_to_an_object_is_found_also_where_the_job_has_frozen_its_own(freezes):
    thing = ["thing"]
    with importing():
        imported = [thing]
    holder = [thing]
    if freezes:
        gc.freeze()

    found = referrers([thing])

    freeze_imported()  # the next tests are innocent
    assert any(one is holder for one in found)
    assert any(one is imported for one in found) == freezes
    assert not [one for one in found if one is not holder and one is not imported]
